"""llama.cpp in a process of its own: its libraries can't live beside those that the other tests have loaded.

    python run_llama_cpp.py FILE.gguf SIZE < prompt.json

prints the log-probability of each of SIZE ids after the prompt, a text or ids, as the last line.
"""

import json
import sys

import xllamacpp as llama


def main() -> None:
    """Float32 throughout, on one thread."""
    settings = llama.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 128, 1, False, -1
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = 1
    options = {"n_predict": 1, "temperature": 0.0, "n_probs": int(sys.argv[2]), "cache_prompt": False}
    answer = llama.Server(settings).handle_completions({"prompt": json.load(sys.stdin), **options})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    sys.stdout.write("\n" + json.dumps({entry["id"]: entry["logprob"] for entry in found}) + "\n")


if __name__ == "__main__":
    main()
