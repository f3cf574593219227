"""What the tests make by hand: a tiny tokenizer, random tiny policies of four architectures, an oracle of sampling."""

import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = "this that film plot was is great dull and but i loved it .".split()
POSITIONS = 40
ARCHITECTURES = ("gpt2", "gemma3", "llama", "qwen2")


def make_tokenizer(words=WORDS, bos=True, pad="<pad>"):
    """A word-level tokenizer; with `bos` every text begins with <bos>. `pad` may be "<eos>"."""
    special = list(dict.fromkeys([pad, "<bos>", "<eos>", "<unk>"]))
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False)


def make_policy(architecture, vocabulary, dtype=torch.float64, seed=0, **settings):
    """A random policy of 2 layers (Gemma 3: a sliding and a full one) and width 16.

    The initial weights are large, so that next-token distributions are far from uniform. Further
    `settings` go to the library's config.
    """
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    modern = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, **ids, **settings}
    torch.manual_seed(seed)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**{
            "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **ids, **settings}))
    elif architecture == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**{
            "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"], **modern}))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**modern))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**modern))
    with torch.no_grad():  # the library starts biases at 0 and gains at 1 (or 0), which would hide their misuse
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


@torch.no_grad()
def naive_completion(model, prompt, uniforms, eos, temperature):
    """An oracle of sampling: one token at a time, no cache, no batch; walk up the distribution until it passes u.

    Returns the ids and their log-probabilities, EOS included.
    """
    ids, logps = list(prompt), []
    for u in uniforms.tolist():
        p = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1).tolist()
        token, total = 0, p[0]
        while total <= u and token < len(p) - 1:
            token += 1
            total += p[token]
        ids.append(token)
        logps.append(math.log(p[token]))
        if token == eos:
            break
    return ids[len(prompt):], logps
