"""Every completion of a small policy with its exact probability: what the estimators are held against."""

import torch


def completions(model, tokenizer, prompt: str, length: int, temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """Completion → log-probability in nats, all of them, by the library's own forward, one unpadded batch a depth."""
    start = tokenizer(prompt)["input_ids"]
    alive, done = {(): 0.0}, {}
    for depth in range(length):
        prefixes = list(alive)
        with torch.no_grad():
            logits = model(torch.tensor([[*start, *prefix] for prefix in prefixes])).logits[:, -1]
        logp = (logits.double() / temperature).log_softmax(-1)
        grown = {}
        for prefix, row in zip(prefixes, logp.tolist()):
            for token, value in enumerate(row):
                ended = token == tokenizer.eos_token_id or depth == length - 1
                (done if ended else grown)[(*prefix, token)] = alive[prefix] + value
        alive = grown
    return done


def exact_kl(p: dict, q: dict) -> float:
    """KL(p ‖ q) from log-probabilities of the same completions."""
    p, q = (torch.tensor([d[key] for key in p], dtype=torch.float64) for d in (p, q))
    return (p.exp() * (p - q)).sum().item()
