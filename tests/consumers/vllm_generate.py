"""Continue prompts with vLLM, greedily, on the CPU.

    VLLM_PYTHON tests/consumers/vllm_generate.py REPORT.json FOLDER DTYPE PROMPTS

PROMPTS are token ids, a JSON list of lists. The report has for each its continuation, and the log-probabilities, in
nats, of its tokens but the first.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

from vllm import LLM, SamplingParams

NUM_TOKENS = 40

if __name__ == "__main__":
    report, folder, dtype, prompts = sys.argv[1:]
    model = LLM(folder, enforce_eager=True, dtype=dtype, max_model_len=512, seed=0)
    how = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, prompt_logprobs=1)
    found = []
    for answer in model.generate([{"prompt_token_ids": ids} for ids in json.loads(prompts)], how):
        scored = zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)
        found.append(
            {"ids": list(answer.outputs[0].token_ids), "logprobs": [known[token].logprob for token, known in scored]}
        )
    Path(report).write_text(json.dumps(found))
