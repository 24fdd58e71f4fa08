"""lm-evaluation-harness itself, on tasks of its own that need no network.

Run with GLM4MOE_LM_EVAL_PYTHON set to an interpreter that has lm_eval 0.4.13 and what this project needs.
"""

import json
import math
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from runtime.engine.request import SamplingParams
from runtime.harness.answers import Answerer, GenerateOptions, rolling_pairs
from tests.architecture.sources import ROOT

TASK_FILE = ROOT / "runtime" / "harness" / "glm4moe.yaml"
LENGTH = 128
QUESTIONS = [
    {"q": "def f(self):\n    return", "choices": [" self", "zzz", "%%%%"], "answer": 0},
    {"q": "import", "choices": ["!!", " re", "@@x"], "answer": 1},
]
PROMPT = "def is_empty(self):\n"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list: [{{metric: {metric}}}]
"""


def write_tasks(folder: Path, documents: list[str]) -> None:
    lines = {
        "rolling": [{"text": text} for text in documents],
        "choice": QUESTIONS,
        "answer": [{"q": PROMPT, "a": "x"}],
    }
    for name, values in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(value)}\n" for value in values))
    tasks = [
        ("rolling", "loglikelihood_rolling", "", "{{text}}", "", "byte_perplexity"),
        ("choice", "multiple_choice", "{{q}}", "{{answer}}", 'doc_to_choice: choices\ntarget_delimiter: ""', "acc"),
        (
            "answer",
            "generate_until",
            "{{q}}",
            "{{a}}",
            'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}',
            "exact_match",
        ),
    ]
    for name, kind, text, target, more, metric in tasks:
        values = {"kind": kind, "text": text, "target": target, "more": more, "metric": metric}
        content = TASK.format(name=f"local_{name}", data=folder / f"{name}.jsonl", **values)
        (folder / f"{name}.yaml").write_text(content)


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that has lm_eval."""
    found = os.environ.get("GLM4MOE_LM_EVAL_PYTHON")
    if not found:
        pytest.skip("GLM4MOE_LM_EVAL_PYTHON names no interpreter with lm_eval")
    return found


@pytest.fixture(scope="session", params=["lm_eval", "runtime.harness"])
def lm_eval(
    request: pytest.FixtureRequest, python: str, tiny: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one run of all tasks found, by the harness's own program or by ours: results, and logged samples by task."""
    folder, out = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("out")
    text = held_out.read_text(encoding="utf-8")
    write_tasks(folder, [text[:2000], text[5000:6500]])
    tasks, program = "local_rolling,local_choice,local_answer", [python, "-m", "runtime.harness"]
    if request.param == "lm_eval":
        # it imports from where it is installed, as it would this package
        program, tasks = [str(Path(python).with_name("lm_eval"))], f"{tasks},{TASK_FILE}"
    command = [
        *(*program, "--model", "glm4moe", "--log_samples"),
        *("--model_args", f"pretrained={tiny},dtype=float32,max_length={LENGTH}"),
        *("--include_path", folder, "--tasks", tasks, "--output_path", out),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf"), "OMP_NUM_THREADS": "1"}
    offline |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = out.rglob("results_*.json")
    samples = {
        path.name.split("_local_")[1].split("_")[0]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in out.rglob("samples_*.jsonl")
    }
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


@pytest.fixture(scope="session")
def answerer(tiny: Path) -> Answerer:
    return Answerer.open(tiny, dtype="float32", device="cpu", max_length=LENGTH)


@pytest.mark.lm_eval
def test_byte_perplexity_is_the_one_of_our_own_sums(lm_eval, answerer, held_out):
    text = held_out.read_text(encoding="utf-8")
    nats, num_bytes = 0.0, 0
    for document in (text[:2000], text[5000:6500]):
        pairs = rolling_pairs(answerer.tokenizer.encode(document), answerer.end_token_id, LENGTH)
        nats -= sum(answerer.likelihood(*pair).logprob for pair in pairs)
        num_bytes += len(document.encode())
    found = lm_eval["results"]["local_rolling"]["byte_perplexity,none"]
    assert found == pytest.approx(math.exp(nats / num_bytes), rel=1e-6)


@pytest.mark.lm_eval
def test_nothing_else_is_measured(lm_eval):
    """The group that has the harness find the model has a name among the results, and no figure."""
    figures = {name for name, found in lm_eval["results"].items() if set(found) - {"alias", "name", "sample_count"}}
    assert figures == {"local_rolling", "local_choice", "local_answer"}


@pytest.mark.lm_eval
def test_likely_choices_are_chosen(lm_eval):
    assert lm_eval["results"]["local_choice"]["acc,none"] == 1.0


@pytest.mark.lm_eval
def test_answers_are_those_of_our_own_engine(lm_eval, answerer):
    prompt = answerer.tokenizer.encode(PROMPT)
    asked = GenerateOptions(until=("\n\n",), params=SamplingParams(max_tokens=24))
    (sample,) = lm_eval["samples"]["answer"]
    assert sample["resps"] == [[answerer.generate(prompt, asked)]]


@pytest.mark.lm_eval
def test_rolling_windows_are_those_of_the_harness(python):
    """Its own functions, run by its own interpreter."""
    program = (
        "import json; from lm_eval.utils import get_rolling_token_windows as cut, make_disjoint_window as part\n"
        "print(json.dumps([[list(map(part, cut(list(range(n)), 99, 4, 1))) for n in range(14)]]))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    ours = [[list(map(list, pair)) for pair in rolling_pairs(range(n), 99, 4)] for n in range(14)]
    assert json.loads(done.stdout.splitlines()[-1]) == [ours]


@pytest.mark.lm_eval
def test_entry_point_is_a_model_of_the_harness(python):
    """0.4.13 reads no entry points, but its registry takes one, as those behind it do."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        ((name, value),) = tomllib.load(file)["project"]["entry-points"]["lm_eval.models"].items()
    program = (
        "from importlib.metadata import EntryPoint; from lm_eval.api.registry import get_model, model_registry as r\n"
        f"r.register({name!r}, target=EntryPoint({name!r}, {value!r}, 'lm_eval.models'))\n"
        f"print(get_model({name!r}).__module__)\n"
        "import runtime.harness.registration"
    )
    done = subprocess.run([python, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (name, done.stdout) == ("glm4moe", "runtime.harness.model\n")


@pytest.mark.lm_eval
def test_the_program_tells_the_file_for_the_list_of_tasks(python):
    command = [python, "-m", "runtime.harness", "--where"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{TASK_FILE}\n"
