"""llama.cpp answers prompts greedily: run in an environment of its own, without r1ray.

python compression_export_child.py TASK.json

The last line of output is {"answers": [[token, ...], ...]}.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["answer_prompts"]


def answer_prompts(task: dict[str, Any]) -> list[list[int]]:
    """`new_tokens` greedy tokens behind each of the `prompts` of one length."""
    import llama_cpp

    length = len(task["prompts"][0]) + task["new_tokens"]
    llama = llama_cpp.Llama(task["model"], n_ctx=length, n_threads=2, verbose=False)
    answers = []
    for prompt in task["prompts"]:
        llama.reset()
        tokens = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answers.append([int(token) for token in itertools.islice(tokens, task["new_tokens"])])
    return answers


if __name__ == "__main__":
    print(json.dumps({"answers": answer_prompts(json.loads(Path(sys.argv[1]).read_text()))}))
