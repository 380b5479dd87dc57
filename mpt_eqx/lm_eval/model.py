"""The model: log-likelihoods by `score`, texts by `generate`, prompts as in the harness's model for transformers."""

import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mpt_eqx.checkpoint import checkpoint_info, from_pretrained
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.errors import GenerationError, MPTError
from mpt_eqx.evaluation import score
from mpt_eqx.generation import generate
from mpt_eqx.generation.validate import check_count
from mpt_eqx.lm_eval.requests import (
    BATCH_TOKENS,
    Plan,
    Request,
    batches_of_rows,
    batches_of_tokens,
    check_known,
    cut,
    find_device,
    read_batch_size,
    read_plan,
    request_keys,
    up_to,
)
from mpt_eqx.lora import load as load_adapters
from mpt_eqx.model import MPT
from mpt_eqx.surgery.quantization import quantize as quantize_model
from mpt_eqx.text import Tokenizer, load_tokenizer
from mpt_eqx.text.tokenizer import ends_in_stop

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MPTError(
        "the lm-evaluation-harness is needed for its tasks; install it with pip install 'mpt_eqx[eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)


@register_model("mpt-eqx")
class MPTLM(TemplateLM):  # type: ignore[misc]  # it has no types
    """A model and its tokenizer, as lm-evaluation-harness asks for them.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        max_length: the most tokens that it reads.
        max_gen_toks: how many new tokens a task gets that does not say.
        batch_size: as given.
    """

    def __init__(
        self,
        pretrained: str | Path | MPT,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        dtype: str | None = "auto",
        quantize: str | None = None,
        peft: str | Path | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        chat_template: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        **others: Any,
    ):
        """Loads a model.

        Args:
            pretrained: a checkpoint, as `from_pretrained` takes it; or a model, which needs a tokenizer beside it.
            tokenizer: a tokenizer, or the checkpoint that has it; None for the model's own.
            revision: branch, tag or commit of a Hub repository.
            subfolder: directory within it that holds the checkpoint.
            dtype: "float32", "bfloat16" or "float16"; "auto" and None keep the stored type.
            quantize: "int8" or "int4" for weights in 8 or 4 bits; None for no change.
            peft: a directory of adapters in PEFT's files.
            max_length: the most tokens that the model reads; None for its max_seq_len. More is possible without learned
                positions.
            max_gen_toks: new tokens where a task does not say how many.
            prefix_token_id: what stands before a text that has nothing before it; None for the tokenizer's bos_token,
                else its end-of-text token.
            add_bos_token: True puts that token before every text, False adds none; None is as tokenizer.json says.
            chat_template: "chatml", "mpt-instruct" or a template, where the harness applies one; None for the
                checkpoint's own.
            batch_size: rows that are computed together, or "auto" for as many as fit 8192 tokens.
            max_batch_size: the most rows of "auto".
            device: as torch calls it, "cpu" or "cuda:1"; None, "cuda" and "cuda:0", the harness's default, are JAX's
                default device.
            seed: of the tokens that are drawn, where a task asks for that.
            **others: `trust_remote_code` is ignored, because code of a checkpoint is never run; nothing else is known.

        Raises:
            MPTError: an argument is not valid, or the checkpoint cannot be read.
        """
        super().__init__()
        check_known(type(self), others)
        self.batch_size = read_batch_size(batch_size)
        check_count("max_gen_toks", max_gen_toks)
        for name, number in (("max_length", max_length), ("max_batch_size", max_batch_size)):
            if number is not None:
                check_count(name, number)
        self.max_batch_size = max_batch_size or 64
        self.max_gen_toks, self.add_bos_token, self._template = max_gen_toks, add_bos_token, chat_template
        self._seed = seed
        self.revision, self._place = revision or "main", "model"
        if isinstance(pretrained, MPT):
            if tokenizer is None:
                raise GenerationError("tokenizer: expected one beside a model, found none; give its checkpoint")
            self.model = pretrained
        else:
            place = find_checkpoint(str(pretrained), revision=revision, subfolder=subfolder)
            self._place, tokenizer = str(place), place if tokenizer is None else tokenizer
            longer = max_length is not None and max_length > checkpoint_info(place).config.max_seq_len
            self.model = from_pretrained(
                place, dtype=None if dtype == "auto" else dtype, device=find_device(device),
                config_overrides={"max_seq_len": max_length} if longer else None,
            )  # fmt: skip
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        if quantize is not None:
            self.model = quantize_model(self.model, quantize)
        if peft is not None:
            self.model = load_adapters(self.model, peft)
        self.max_length = self.model.config.max_seq_len if max_length is None else max_length
        if self.max_length > (most := self.model.config.max_seq_len):
            raise GenerationError(f"max_length: expected at most the model's max_seq_len={most}, found {max_length}")
        bos = self.tokenizer.bos_token_id if prefix_token_id is None else prefix_token_id
        self._prefix = self.eot_token_id if bos is None else bos
        self._vocab_size = min(self.tokenizer.vocab_size, self.model.config.vocab_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self.tokenizer.eos_token_ids:
            raise GenerationError("prefix_token_id: expected the id that begins a text, found no end-of-text token")
        return self.tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that has nothing before it."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer is from, for the names of the harness's own caches."""
        return re.sub(r"[^\w.-]+", "__", self._place)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the token ids of a text; without `add_special_tokens`, those that begin it stand there once."""
        wanted = self.add_bos_token is not False if add_special_tokens is None else add_special_tokens
        ids = self.tokenizer.encode(string, add_special_tokens=wanted)
        bos = self.prefix_token_id
        if add_special_tokens is None and ids[:2] == [bos, bos]:
            return self.tokenizer.encode(string, add_special_tokens=False)  # the text itself begins with it
        if add_special_tokens is None and self.add_bos_token and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether greedy decoding would give it."""
        rows = [cut(request, self.max_length) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        most = BATCH_TOKENS if isinstance(self.batch_size, str) else self.batch_size * self.max_length
        # Answers to one question come together, which `score` reads once, and long ones first, as in the harness.
        order = sorted(range(len(rows)), key=lambda i: (-rows[i][1], rows[i][0][: rows[i][1]], -len(rows[i][0])))
        with self._bar(len(rows), "loglikelihood", disable_tqdm) as bar:
            for batch in batches_of_tokens(order, [len(row) for row, _ in rows], most):
                scores = score(
                    self.model, [rows[i][0] for i in batch], prefix_lengths=[rows[i][1] for i in batch],
                    batch_tokens=most, progress=False,
                )  # fmt: skip
                for i, result in zip(batch, scores, strict=True):
                    found[i] = result.total, bool(result.is_greedy.all())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update(len(batch))
        return [found[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows that do not overlap in what they predict."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [float(sum(total for total, _ in itertools.islice(found, count))) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Returns the text that follows each prompt, up to the first of its stop strings."""
        plans = [read_plan(request.args[1], self.max_gen_toks) for request in requests]
        prompts = [self._prompt(request.args[0], plan) for request, plan in zip(requests, plans, strict=True)]
        keys = request_keys(self._seed, [request.args for request in requests])
        texts: dict[int, str] = {}
        with self._bar(len(prompts), "generate_until", disable_tqdm) as bar:
            for batch in batches_of_rows(prompts, plans, self.batch_size, self.max_batch_size):
                options, max_gen_toks, stops = plans[batch[0]]

                def ended(_: int, tokens: list[int], stops: list[str] = stops) -> bool:
                    return ends_in_stop(self.tokenizer, tokens, stops)

                result = generate(
                    self.model, [prompts[i] for i in batch], max_new_tokens=max_gen_toks, key=keys(batch),
                    eos_token_ids=self.tokenizer.eos_token_ids, vocab_size=self._vocab_size, progress=False,
                    until=ended if stops else None, **options,
                )  # fmt: skip
                for i, tokens, length in zip(batch, result.tokens, result.lengths, strict=True):
                    text = self.tokenizer.decode(tokens[:length].tolist())
                    texts[i] = postprocess_generated_text(text, stops, None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update(len(batch))
        return [texts[i] for i in range(len(prompts))]

    def _prompt(self, text: str, plan: Plan) -> list[int]:
        """Returns the token ids of a prompt, cut on the left to leave room for the new tokens."""
        room = self.max_length - plan[1]
        if room < 1:
            raise GenerationError(
                f"max_gen_toks: expected less than max_length={self.max_length}, because the prompt needs room, too, "
                f"found {plan[1]}"
            )
        return self.tok_encode(text)[-room:] or [self.prefix_token_id]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt that the chat template makes of messages.

        Without `add_generation_prompt` it ends with the last message, which the model is to continue. A template that
        refuses a system message gets the others. Special tokens in messages are those tokens, as in the harness's other
        models, because it passes prompts on as text.
        """
        try:
            text = self._rendered(chat_history, add_generation_prompt)
        except MPTError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            logger.warning("the chat template refuses these messages, and gets them without those of the system")
            text = self._rendered(others, add_generation_prompt)
        return text if add_generation_prompt else up_to(text, chat_history[-1]["content"])

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        pieces = self.tokenizer.chat_pieces(
            messages, chat_template=self._template, add_generation_prompt=add_generation_prompt
        )
        return "".join(text for text, _ in pieces)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the chat template, which the harness writes into its results; None where it applies none.

        Raises:
            MPTError: the harness was given the name of another template than this model.
        """
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str) and chat_template != self._template:
            raise MPTError(
                f"chat_template: expected the one that the model was made with, {self._template!r}, found "
                f"{chat_template!r}; give the model chat_template={chat_template}"
            )
        return self.tokenizer.chat_template(self._template)

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness writes about the model into its results."""
        return {
            "model_num_parameters": self.model.config.num_parameters(),
            "model_dtype": self.model.wte.weight.dtype.name,
            "model_revision": self.revision,
        }

    def _bar(self, total: int, what: str, hidden: bool) -> tqdm:
        return tqdm(total=total, desc=f"Running {what} requests", disable=hidden or self.rank != 0)
