"""Features of a published dictionary, found by words and clamped while the model writes, beside a random one. Half a minute on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import steer
from steer.features import random_features

TEXTS = Path(__file__).parent / "war_and_peace.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded model, a hub id or a folder (default: %(default)s)")
    parser.add_argument("--dictionary", default="smollm2-135m-sae-12", help="shipped, a file, a folder or a hub id (default: %(default)s)")
    parser.add_argument("--words", nargs="+", default=["army", "troops", "war", "battle", "soldiers"], help="of the concept (default: war)")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="file to search, one text a line (default: war_and_peace.txt)")
    parser.add_argument("--features", type=int, default=3, help="the best so many are clamped, one by one (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=28, help="length of an answer (default: %(default)s)")
    args = parser.parse_args()

    model, tokenizer = steer.load(args.model)
    dictionary = steer.load_dictionary(args.dictionary)
    site = dictionary.writes[0]

    # Chosen on one half of the texts, reported on the other.
    texts = args.texts.read_text(encoding="utf-8").splitlines()
    found = steer.find_features(model, dictionary, {"concept": args.words}, tokenizer=tokenizer, texts=texts)
    hits = [hit.feature for hit in found.of("concept")[: args.features]]
    control = random_features(dictionary, hits[:1], draws=1, seed=0)[0][0]  # on about as often

    turn = [{"role": "user", "content": "What did you do today?"}]
    chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    def answer() -> str:
        tokens = model.generate(**chat, max_new_tokens=args.tokens, do_sample=False)
        return tokenizer.decode(tokens[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)

    print("plain:", answer())
    for what, feature in (*(("the concept", feature) for feature in hits), ("random", control)):
        clamp = steer.ClampFeatures(dictionary, [feature], to=1.0, of_maximum=True)
        with steer.Plan(steer.Intervention(clamp, site, scope="generated")).attached(model):
            print(f"feature {feature} ({what}):", answer())


if __name__ == "__main__":
    main()
