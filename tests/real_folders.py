"""Random small models on disk as people have them: five architectures, each with a tokenizer of its own kind."""

import json

import torch
from tiny import make_policy
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from warp_lite.policies.loading import save_policy

TEXTS = ["this film was great and i loved it .", "that plot is dull but i loved the naïve ending !",
         "a long western: nobody wanted it, 12 people saw it.", "the café scene wasn't bad at all — it's superb"] * 4
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_level(size=320):
    """Vocabulary and merges of a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return vocabulary_and_merges(tokenizer)


def vocabulary_and_merges(tokenizer):
    """The two tables of a BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def gpt2_tokenizer(pad="<|endoftext|>"):
    """GPT-2's: byte-level BPE, one special token; nothing in front of a text."""
    vocabulary, merges = byte_level()
    return GPT2Tokenizer(vocab={**vocabulary, "<|endoftext|>": len(vocabulary)}, merges=merges, pad_token=pad)


def qwen2_tokenizer():
    """Qwen 2's: byte-level BPE, NFC, a chat template whose turns end with EOS."""
    vocabulary, merges = byte_level()
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>",
                               extra_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def gemma_tokenizer():
    """Gemma's: SentencePiece's BPE with bytes to fall back on, <bos> in front of a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=380, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False))
    vocabulary, merges = vocabulary_and_merges(tokenizer)
    return GemmaTokenizer(vocab=vocabulary, merges=merges)


def llama_tokenizer():
    """A SentencePiece Unigram with ▁ for a space, <s> in front of a text and no padding token."""
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
    letters = sorted({letter for word in words for letter in word})
    pieces = [*((token, 0.0) for token in ("<unk>", "<s>", "</s>")), *((word, -4.0 - 0.01 * i) for i, word in
              enumerate(words)), *((letter, -9.0) for letter in letters if letter not in words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"gpt2": gpt2_tokenizer, "gemma3": gemma_tokenizer, "llama": llama_tokenizer, "qwen2": qwen2_tokenizer}


def policy_folder(architecture, folder, tokenizer=None, seed=0, **settings):
    """A random policy of the architecture with a tokenizer of its kind, saved as the library saves it."""
    tokenizer = tokenizer or TOKENIZERS[architecture]()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}
    model = make_policy(architecture, len(tokenizer), torch.float32, seed, **{**special, **settings})
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=7)
    save_policy(model, tokenizer, folder)
    return folder


def classifier_folder(folder):
    """A random DistilBERT of two labels with a WordPiece tokenizer."""
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.train_from_iterator(TEXTS, trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    tokenizer = DistilBertTokenizer(vocab=wordpiece.get_vocab())
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=48,
        initializer_range=0.5, pad_token_id=tokenizer.pad_token_id, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1}))
    save_policy(model.eval(), tokenizer, folder)
    return folder
