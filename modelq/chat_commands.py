"""`modelq chat` and `modelq compare`."""
from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from modelq.commands import Report

GAP = "  |  "       # between two columns of text


def options_of(args: Namespace) -> dict[str, Any]:
    return {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
            "seed": args.seed}


# modelq chat -------------------------------------------------------------------------------------------------------------------

def chat(args: Namespace) -> Report:
    import modelq
    from modelq.conversation import Answer, Conversation
    conversation = Conversation(modelq.load(args.source, compute=args.compute, num_threads=args.threads), args.system, args.plain,
                                **options_of(args))
    answers = []
    interactive = args.prompt is None and sys.stdin.isatty()
    for text in [args.prompt] if args.prompt is not None else questions(interactive):
        try:
            for part in conversation.ask(text):
                if isinstance(part, Answer):
                    answers.append({"prompt": text, **as_data(part)})
                    if not args.json:
                        print(f"\n[{part.speed()}]", file=sys.stderr, flush=True)
                elif not args.json:
                    print(part, end="", flush=True)
        except (ValueError, KeyboardInterrupt) as error:        # on a terminal Ctrl-C ends the answer, at the prompt the chat
            if not interactive:
                raise
            print(f"\nmodelq: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)
            continue
        if not args.json:
            print(flush=True)
    return Report({"source": args.source, "answers": answers})


def questions(interactive: bool) -> Iterator[str]:
    """The lines of stdin that say something, up to its end."""
    if interactive:
        with suppress(ImportError):     # lines can be edited then
            import readline  # noqa: F401
    while True:
        try:
            text = input("> " if interactive else "")
        except EOFError:
            return
        if text.strip():
            yield text


def as_data(answer: Any) -> dict[str, Any]:
    return {"text": answer.text, "tokens": len(answer.tokens), "tokens_per_second": answer.tokens_per_second,
            "prompt_tokens": answer.prompt_tokens, "prompt_seconds": answer.prompt_seconds}


# modelq compare ----------------------------------------------------------------------------------------------------------------

def compare(args: Namespace) -> Report:
    import modelq
    from modelq.conversation import distance, first_difference, prompt_ids, whole_answer
    sources = [args.first, args.second]
    models = [modelq.load(source, compute=args.compute, num_threads=args.threads) for source in sources]
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": args.prompt})
    prompts = [prompt_ids(model, messages, args.plain) for model in models]
    if prompts[0] != prompts[1]:
        raise ValueError(f"{sources[0]} and {sources[1]} see the prompt as different tokens: only models with one tokenizer and one chat "
                         "template can be compared token by token (--plain leaves the template out)")
    answers = [whole_answer(model, prompts[0], **options_of(args)) for model in models]
    at = first_difference(answers[0].tokens, answers[1].tokens)
    found = distance(models[0], models[1], prompts[0], answers[0].tokens)
    data = {"prompt": args.prompt, "prompt_tokens": len(prompts[0]),
            "models": [{"source": source, **as_data(answer)} for source, answer in zip(sources, answers)],
            "first_difference": at, "kl_divergence": found.divergence, "largest_kl_divergence": found.largest_divergence,
            "top1_agreement": found.agreement, "positions": found.positions}
    difference = "the same tokens" if at is None else f"first difference at token {at + 1}: " + " and ".join(
        repr(model.tokenizer.decode(answer.tokens[at:at + 1])) for model, answer in zip(models, answers))
    rows = [[source, len(answer.tokens), answer.tokens_per_second, answer.prompt_seconds] for source, answer in zip(sources, answers)]
    return Report(data, [side_by_side(sources, [answer.text for answer in answers], shutil.get_terminal_size().columns), "",
                         (["model", "tokens", "tokens/s", "seconds to the first"], rows), "", difference,
                         f"next token along the first answer: KL divergence {found.divergence:.4g} nats (largest "
                         f"{found.largest_divergence:.4g}), the same likeliest token at {found.agreement:.1%} of {found.positions} places"])


def side_by_side(titles: list[str], texts: list[str], columns: int) -> str:
    """Two texts in two columns of a terminal that is so wide."""
    width = max(20, (columns - len(GAP)) // 2)
    left, right = ([title[-width:], "-" * width, *(line for paragraph in text.splitlines() for line in wrap(paragraph, width) or [""])]
                   for title, text in zip(titles, texts))
    return "\n".join(f"{a:<{width}}{GAP}{b}".rstrip() for a, b in zip_longest(left, right, fillvalue=""))
