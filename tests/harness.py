"""Tasks of lm-evaluation-harness on local data, and what its numbers are compared by."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "harness"
SETTINGS = {
    "whole": {"num_fewshot": 0, "max_length": 256},
    "truncated": {"num_fewshot": 2, "max_length": 64},
}
"""Of the runs that are recorded: the second cuts prompts on the left, and texts into several windows."""

SHARED = """
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
"""

TASKS = {
    "choices": """
task: choices
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "questions": """
task: questions
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [".", "\\n\\n", " a "], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(directory):
    """Writes one yaml for each task into a directory."""
    directory.mkdir(exist_ok=True)
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(text + SHARED.format(file=GOLDEN / f"{name}.jsonl"))
    return directory


def numbers(results):
    """Returns the metrics of each task, and the answers of the model to each request in order."""
    metrics = {
        task: {name.split(",")[0]: value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }
    answers = {
        task: [answer for doc in sorted(docs, key=lambda doc: doc["doc_id"]) for (answer,) in doc["resps"]]
        for task, docs in results["samples"].items()
    }
    return {"metrics": metrics, "answers": answers}
