"""Run by an interpreter that has vLLM: greedy tokens and their log-probabilities of a folder on two CPU ranks, as JSON.

vllm_greedy.py FOLDER LOAD_FORMAT OUT
"""

import json
import os
import sys
from pathlib import Path

PROMPTS = ["def heappush(heap, item):", "import os\n", "class Stack:\n    def ", "for index in range("]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def main(folder: str, load_format: str, out: str) -> None:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams, __version__

    engine = LLM(
        model=folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        load_format=load_format,
        tensor_parallel_size=2,
    )
    answers = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32, logprobs=1))
    found = {
        "version": __version__,
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "logprobs": [answer.outputs[0].cumulative_logprob for answer in answers],
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
