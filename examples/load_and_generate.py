"""Load a packed model, from a folder or the Hub, and generate text.

python examples/load_and_generate.py me/SmolLM2-135M-arb-rc --prompt "The history of the lighthouse"
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer

import arb_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="packed model: folder, or name on the Hub")
    parser.add_argument("--prompt", default="The history of the lighthouse begins in", help="text to continue")
    parser.add_argument("--tokens", type=int, default=24, help="number of tokens to generate")
    arguments = parser.parse_args()

    model = arb_hf.from_pretrained(arguments.model)  # AutoModelForCausalLM's, with every file checked
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{arguments.model} has no tokenizer; save one beside it: {error}\n")
    print(arb_hf.summary(model))
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
