"""`lmscale generate CHECKPOINT --prompt TEXT`: continue a text with a trained model, in one process."""

import argparse
import json
from pathlib import Path

from lmscale import log as logs
from lmscale.config.run import RunConfig
from lmscale.corpus.manifest import Manifest, resolve, tokenizer_path
from lmscale.errors import ExitCode, UsageError
from lmscale.text.special import Special
from lmscale.text.tokenizer import Tokenizer
from lmscale.train.restore import check_tokenizer, find_trained
from lmscale.world import World


def main(argv: list[str]) -> ExitCode:
    """Print the continuation, or with --json {"tokens": [the new ones], "text": ...}."""
    parser = argparse.ArgumentParser(prog="python -m lmscale generate")
    parser.add_argument("checkpoint", type=Path)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt")
    given.add_argument("--tokens")
    parser.add_argument("--max-new", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    logs.configure(World())
    trained = find_trained(args.checkpoint)
    tokenizer = run_tokenizer(trained.cfg)
    check_tokenizer(trained, tokenizer.fingerprint)
    prompt = _prompt(args, tokenizer)
    from lmscale.train.use import load_model

    model = load_model(trained.cfg, trained.path, vocab_size=tokenizer.vocab_size)
    from lmscale.model.generate import generate

    new = generate(
        model,
        prompt,
        max_new=args.max_new,
        temperature=args.temperature,
        eos=None if args.ignore_eos else tokenizer.special.eos,
        seed=args.seed,
    )
    text = tokenizer.decode(new)
    print(json.dumps({"tokens": new, "text": text}) if args.json else text)
    return ExitCode.DONE


def run_tokenizer(cfg: RunConfig) -> Tokenizer:
    """The tokenizer of a run: data.tokenizer, else the one beside its training corpus."""
    if cfg.data.tokenizer is not None:
        return Tokenizer.load(Path(cfg.data.tokenizer))
    corpus = resolve(Path(cfg.data.corpora[0].path), "train")
    manifest = Manifest.load(corpus)
    special = Special(**manifest.tokenizer.special)  # roles are not in tokenizer.json
    return Tokenizer.load(tokenizer_path(corpus, manifest), special)


def _prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if args.prompt is not None:
        bos = tokenizer.special.bos
        return ([] if bos is None else [bos]) + tokenizer.encode(args.prompt)
    try:
        tokens = [int(token) for token in args.tokens.split(",")]
    except ValueError:
        raise UsageError(f"--tokens {args.tokens!r}: write ids like 17,4,256") from None
    wrong = [token for token in tokens if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise UsageError(
            f"--tokens: {wrong} are not ids of this vocabulary of {tokenizer.vocab_size}"
        )
    return tokens
