"""`mpt-eqx eval`: tasks of lm-evaluation-harness."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from mpt_eqx.cli.chat import read_template
from mpt_eqx.cli.options import add_loading, add_model, count, keep_compiled, read_overrides
from mpt_eqx.errors import GenerationError, MPTError, first_of

DESCRIPTION = """Evaluates a model on tasks of lm-evaluation-harness (extra `eval`), prints its table to stdout, and
writes its files, results and samples, into --output. Log-likelihoods are those of `mpt_eqx.score`."""

EPILOG = """The data of a task comes from where its description says: the Hugging Face Hub, or local files. `python -m
mpt_eqx.lm_eval ls tasks` lists the tasks, and `python -m mpt_eqx.lm_eval run --model mpt-eqx …` has every option of the
harness.
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "eval", parents=[shared], help="tasks of lm-evaluation-harness", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model(parser, "--model")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks or groups; * is any text")
    parser.add_argument(
        "--include-path", action="append", default=[], metavar="DIR",
        help="directory with descriptions (yaml) of more tasks; may be repeated (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--num-fewshot", type=count(0), metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=count(1), metavar="N", help="first documents of each task (default: all)")
    parser.add_argument("--output", metavar="DIR", help="directory for the harness's files (default: none are written)")
    parser.add_argument(
        "--batch-size", default="auto", metavar="N",
        help="rows that are computed together, or auto; on a CPU results do not depend on it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quantize", metavar="Q", help="weights in int8 or int4 (default: no change)")
    parser.add_argument(
        "--template", nargs="?", const="checkpoint", metavar="T",
        help="put prompts into a chat template: without T the checkpoint's own, else chatml, mpt-instruct or a file "
        "with a Jinja template (default: no template)",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    parser.add_argument("--cache", metavar="FILE", help="keep answers here, and take them from here (default: none)")
    parser.add_argument(
        "--seed", type=count(0), default=0, metavar="S",
        help="of examples and of tokens that are drawn (default: %(default)s)",
    )  # fmt: skip
    add_loading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table, and returns the exit code."""
    import mpt_eqx.lm_eval  # noqa: F401, I001  # first: it says what to install, and makes the harness know the model
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table

    # The harness would fork for its statistics, which JAX's threads do not survive.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    overrides = read_overrides(args) or {}
    if not args.no_compile_cache:
        keep_compiled(args.compile_cache)
    template = read_template(None if args.template == "checkpoint" else args.template)
    model_args = {
        "pretrained": args.model, "revision": args.revision, "dtype": args.dtype, "quantize": args.quantize,
        "peft": args.adapter, "max_length": overrides.get("max_seq_len"), "chat_template": template, "seed": args.seed,
    }  # fmt: skip
    given = {name: value for name, value in model_args.items() if value is not None}
    if args.output is not None:
        _make_directory(args.output)
    with contextlib.redirect_stdout(sys.stderr):  # of what the harness says on its way
        manager, tasks = _find_tasks(args.tasks, args.include_path)
        tracker = EvaluationTracker(output_path=args.output)
        results = lm_eval.simple_evaluate(
            model="mpt-eqx", model_args=given, tasks=tasks, task_manager=manager, num_fewshot=args.num_fewshot,
            limit=args.limit, batch_size=args.batch_size, use_cache=args.cache, evaluation_tracker=tracker,
            apply_chat_template=args.template is not None, system_instruction=args.system, random_seed=args.seed,
            numpy_random_seed=args.seed, torch_random_seed=args.seed, fewshot_random_seed=args.seed,
        )  # fmt: skip
        if args.output is not None:
            _save(tracker, results)
    for kind in ("results", "groups"):
        if results.get(kind):
            print(make_table(results, kind))
    return 0


def _find_tasks(names: str, include_path: list[str]) -> tuple[Any, list[str]]:
    """Returns the harness's manager of tasks, and the names of those that are meant.

    Raises:
        GenerationError: there is no such directory, or no such task.
    """
    from lm_eval.tasks import TaskManager

    if missing := [path for path in include_path if not Path(path).is_dir()]:
        raise GenerationError(f"--include-path: expected a directory, found none at {missing[0]}")
    asked = [name.strip() for name in names.split(",") if name.strip()]
    # The harness reads 14,000 descriptions of its own, which takes a while: not where they are not needed.
    for include_defaults in (False, True) if include_path else (True,):
        manager = TaskManager(include_path=include_path or None, include_defaults=include_defaults)
        found = {name: manager.match_tasks([name]) for name in asked}
        if asked and all(found.values()):
            return manager, list(dict.fromkeys(name for some in found.values() for name in some))
    unknown = [name for name, some in found.items() if not some]
    raise GenerationError(
        f"--tasks: expected names of tasks, found {first_of(unknown) if unknown else 'none'}; "
        f"python -m mpt_eqx.lm_eval ls tasks lists them, --include-path DIR adds some"
    )


def _make_directory(path: str) -> None:
    """Makes --output before hours of work, whose files could not be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GenerationError(f"--output: expected a directory, found none at {path} ({error.strerror})") from None


def _save(tracker: Any, results: dict[str, Any]) -> None:
    """Writes the harness's files, and raises if it did not, which it would only log."""
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    written = list(Path(tracker.output_path).rglob(f"*{getattr(tracker, 'date_id', 'none')}.json*"))
    if len(written) != 1 + len(results["configs"]):
        raise MPTError(
            f"--output: expected {1 + len(results['configs'])} files in {tracker.output_path}, found "
            f"{len(written)} written; see what the harness says above"
        )
