"""Small vocabularies for tests of choosing, made in memory."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tandem.engine.vocabulary import Vocabulary
from tandem.model.tokenizer import Tokenizer

PAD, BOS, EOS = 0, 1, 2


def byte_tokenizer(*words: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> Tokenizer:
    """One token a byte after pad, bos and eos; then whole `words`, which only a model writes; then added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = ["<pad>", "<s>", "</s>", *alphabet]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in words:
        symbols.append(level.pre_tokenize_str(word)[0][0])
    backend = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<pad>", "<s>", "</s>", *special)])
    backend.add_tokens([AddedToken(t, normalized=False) for t in plain])
    assert backend.get_vocab_size() == len(symbols) + len(special) + len(plain), "each text once"
    return Tokenizer(backend)


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, tokenizer.backend.get_vocab_size(), (EOS,))
