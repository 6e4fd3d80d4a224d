"""Vocabularies changed beside real tokenizers: texts come to the same tokens, and models compute the same logits."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import paramend as pm
from support.tiny_models import BASE, FAMILIES, loaded as loaded_family, make, settled

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a quick brown dog, a lazy fox: the dogs jump!",
    "surgery for model parameters, and nothing else moves",
    "aaaa aaa aa a, bananas banana bandana; the the the",
    "été naïve façade — 你好 你好世界 🦊",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def bpe(**options):
    """As GPT-2, Llama 3 and Qwen cut texts."""
    made = tokenizers.Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def clip():
    """As CLIP cuts texts."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    return made


def llama():
    """As Llama 2 cuts texts: every way in which a token is two others is a merge, and unknown letters are bytes."""
    trained = bpe()
    vocab = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += sorted({word for line in CORPUS for word in {"▁" + each for each in line.split()} | {*line}} - {" "})
    words = [token.replace("Ġ", "▁") for token in trained.get_vocab() if token.replace("Ġ", "").isascii()]
    vocab = list(dict.fromkeys([*vocab, "▁", *words]))
    known = set(vocab)
    merges = [(token[:at], token[at:]) for token in vocab for at in range(1, len(token))]
    merges = [(a, b) for a, b in merges if {a, b} <= known and not (a + b).startswith("<")]
    numbers = {token: number for number, token in enumerate(vocab)}
    made = tokenizers.Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


def unigram():
    """As T5 and XLM-RoBERTa cut texts."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=110, special_tokens=SPECIAL, unk_token="<unk>"))
    return made


def wordpiece():
    """As BERT cuts texts."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    made.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    made.enable_padding(pad_id=3, pad_token="<pad>")
    return made


TOKENIZERS = {"bpe": bpe, "clip": clip, "llama": llama, "unigram": unigram, "wordpiece": wordpiece}


def model_of(rows, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 3, "eos_token_id": 2}
    config = transformers.LlamaConfig(**BASE | sizes | {"vocab_size": rows} | changes)
    return transformers.LlamaForCausalLM(config).eval()


def saved(folder, tokenizer, padding=0, **changes):
    """The folder of a model with a tokenizer, and rows without tokens."""
    model = model_of(tokenizer.get_vocab_size() + padding, **changes)
    model.save_pretrained(folder)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return model


def ids_of(tokenizer, texts):
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_of_kept_tokens_come_to_the_mapped_ids(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    saved(tmp_path / "m", tokenizer)
    texts = [CORPUS[0], CORPUS[3], CORPUS[4], CORPUS[0] + " " + CORPUS[1]]
    old = ids_of(tokenizer, texts)
    tree, report = pm.vocabulary(pm.open(tmp_path / "m")).keep(sorted({i for ids in old for i in ids}))
    tree.save(tmp_path / "n")
    new = tokenizers.Tokenizer.from_file(str(tmp_path / "n" / "tokenizer.json"))
    assert ids_of(new, texts) == [[report.ids[i] for i in ids] for ids in old]
    assert new.get_vocab_size() == len(report.ids) < tokenizer.get_vocab_size()
    assert new.get_vocab() == {token: report.ids[i] for token, i in tokenizer.get_vocab().items() if i in report.ids}
    assert [*report.ids] == sorted(report.ids)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "n")
    assert auto(texts)["input_ids"] == ids_of(new, texts)
    assert [auto.unk_token_id, auto.bos_token_id, auto.eos_token_id, auto.pad_token_id] == [0, 1, 2, 3]


def loaded(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return settled(model)


def chosen(report, every=3):
    """Some of the tokens that stayed, old numbers and new."""
    return torch.tensor([*report.ids][::every]), torch.tensor([*report.ids.values()][::every])


def close(new, old):
    assert torch.allclose(new, old, rtol=0, atol=1e-5), (new - old).abs().max()


@pytest.mark.numeric
@pytest.mark.parametrize("tied", [False, True])
def test_kept_tokens_have_their_rows_and_logits(tmp_path, tied):
    model = saved(tmp_path / "m", bpe(), padding=6, tie_word_embeddings=tied)
    tree, report = pm.vocabulary(pm.open(tmp_path / "m")).keep([300, 290, 310, 299])
    tree.save(tmp_path / "n")
    new = loaded(tmp_path / "n")
    kept = torch.tensor([*report.ids])
    assert new.config.vocab_size == len(kept) == new.lm_head.weight.shape[0] < model.config.vocab_size
    assert {300, 290, 310, 299} < set(report.ids)
    assert report.unasked == tuple(i for i in [*report.ids][:-6] if i not in (300, 290, 310, 299))
    assert kept[-6:].tolist() == [*range(model.config.vocab_size - 6, model.config.vocab_size)]  # rows without tokens
    assert torch.equal(new.model.embed_tokens.weight, model.model.embed_tokens.weight[kept])
    assert torch.equal(new.lm_head.weight, model.lm_head.weight[kept])
    before, after = chosen(report)
    close(new(after[None]).logits, model(before[None]).logits[..., kept])


def test_a_module_follows():
    model = model_of(40, pad_token_id=30, eos_token_id=[2, 31], bos_token_id=1)
    model.generation_config.suppress_tokens = [7, 33]
    new, report = pm.vocabulary(model).keep([20, 33])
    kept, texts = [1, 2, 20, 30, 31, 33], torch.tensor([[0, 2, 5, 1]])
    assert [*report.ids] == kept and (new.config.vocab_size, model.config.vocab_size) == (6, 40)
    assert (new.config.eos_token_id, new.config.pad_token_id) == ([1, 4], 3)
    assert new.generation_config.suppress_tokens == [5]
    embedding, head = new.model.embed_tokens, new.lm_head
    assert (embedding.num_embeddings, embedding.padding_idx, head.out_features) == (6, 3, 6)
    old = torch.tensor(kept)[texts]
    close(new(texts).logits, model(old).logits[..., kept])
    new(texts, labels=texts).loss.backward()
    assert pm.vocabulary(model).pad(64)[0](old, labels=old).logits.shape[-1] == 64


@pytest.mark.numeric
@pytest.mark.parametrize("family", [each for each in FAMILIES if each.id != "vit"])
def test_every_family_computes_the_logits_of_kept_tokens(tmp_path, family):
    grouped = family in ("mixtral", "qwen3_moe")  # whose product torch has in float32 alone
    dtype, bound = (torch.float32, 1e-5) if grouped else (torch.float64, 1e-11)
    make(family, dtype).save_pretrained(tmp_path / "m")
    tree, report = pm.vocabulary(pm.open(tmp_path / "m")).keep(range(5, 64, 3))
    tree.save(tmp_path / "n")
    old, new = (loaded_family(family, tmp_path / name).to(dtype) for name in "mn")
    assert new.config.vocab_size == len(report.ids) < 64
    before, after = chosen(report)
    got, want = new(after[None]).logits, old(before[None]).logits[..., [*report.ids]]
    assert torch.allclose(got, want, rtol=0, atol=bound), (got - want).abs().max()


def test_all_tokens_kept_are_the_same_bytes(tmp_path):
    saved(tmp_path / "m", unigram(), padding=3)
    rows = json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"]
    tree, report = pm.vocabulary(pm.open(tmp_path / "m")).keep(range(rows))
    tree.save(tmp_path / "n")
    assert report.size[0] == report.size[1]
    assert all(old == new for old, new in report.ids.items())
    for file in sorted((tmp_path / "m").iterdir()):
        assert file.read_bytes() == (tmp_path / "n" / file.name).read_bytes(), file.name


def test_files_that_name_tokens_follow(tmp_path):
    saved(tmp_path, wordpiece(), bos_token_id=1, eos_token_id=[2, 40])
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    generation |= {
        "bad_words_ids": [[50], [41, 50]],
        "suppress_tokens": [60, 41],
        "forced_decoder_ids": [[1, 42], [2, None]],
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tree, report = pm.vocabulary(pm.open(tmp_path)).keep({41: 7, 50: 0})
    tree.save(tmp_path / "n")
    new = report.ids
    assert {1, 2, 40, 41, 42} <= set(new)
    assert 50 not in new
    generation = json.loads((tmp_path / "n" / "generation_config.json").read_text())
    assert generation["bad_words_ids"] == []
    assert generation["suppress_tokens"] == [new[41]]
    assert generation["forced_decoder_ids"] == [[1, new[42]], [2, None]]
    assert generation["eos_token_id"] == json.loads((tmp_path / "n" / "config.json").read_text())["eos_token_id"]
    assert generation["eos_token_id"] == [new[2], new[40]]
    data = json.loads((tmp_path / "n" / "tokenizer.json").read_text())
    assert data["padding"]["pad_id"] == new[3]
    assert [entry["id"] for entry in data["added_tokens"]] == [new[i] for i in range(4)]


@pytest.mark.numeric
def test_padding_is_no_likely_token(tmp_path):
    model = saved(tmp_path / "m", bpe())
    rows = model.config.vocab_size
    with torch.no_grad():
        model.lm_head.weight.copy_(-3 * model.model.norm.weight + 0.1 * model.lm_head.weight)
    model.save_pretrained(tmp_path / "m")
    tree, report = pm.vocabulary(pm.open(tmp_path / "m")).pad(64)
    tree.save(tmp_path / "n")
    new = loaded(tmp_path / "n")
    assert report.size == (rows, new.config.vocab_size)
    assert new.config.vocab_size % 64 == 0
    assert torch.equal(new.lm_head.weight[:rows], model.lm_head.weight)
    tokens = torch.tensor([[5, 300, 7]])
    old, logits = model(tokens).logits, new(tokens).logits
    close(logits[..., :rows], old)
    more = logits.shape[-1] - rows
    assert (logits.softmax(-1)[..., rows:].sum(-1) <= more / logits.shape[-1] + 1e-6).all()
    again, report = pm.vocabulary(pm.open(tmp_path / "n")).pad(64)
    assert report.size == (logits.shape[-1],) * 2
    assert again.untouched


@pytest.mark.numeric
@pytest.mark.parametrize("padding", [0, 1, 9])
def test_new_tokens_come_next_in_rows_without_tokens_too(tmp_path, padding):
    tokenizer = bpe()
    model = saved(tmp_path / "m", tokenizer, padding=padding)
    count, rows = tokenizer.get_vocab_size(), model.config.vocab_size
    tree, report = pm.vocabulary(pm.open(tmp_path / "m")).extend(["<a>", "bananaland", " fox dog"], init="subwords")
    tree.save(tmp_path / "n")
    assert report.tokens == {"<a>": count, "bananaland": count + 1, " fox dog": count + 2}
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "n")
    assert auto("bananaland<a>", add_special_tokens=False)["input_ids"] == [count + 1, count]
    new = loaded(tmp_path / "n")
    assert new.config.vocab_size == max(rows, count + 3)
    assert torch.equal(new.lm_head.weight[:count], model.lm_head.weight[:count])
    assert torch.equal(new.lm_head.weight[count + 3 :], model.lm_head.weight[count + 3 :])
    for token, number in report.tokens.items():
        parts = tokenizer.encode(token).ids
        for table in ("model.embed_tokens", "lm_head"):
            want = model.get_submodule(table).weight.double()[parts].mean(0).float()
            close(new.get_submodule(table).weight[number], want)
    tokens = torch.tensor([[5, 300, 7]])
    close(new(tokens).logits[..., :count], model(tokens).logits[..., :count])


def test_new_rows_are_means_zeros_or_given():
    model = {
        "embed_tokens": {"weight": np.array([[1.0, 2], [3, 4]], "float32")},
        "lm_head": {"bias": np.array([1.0, 5])},
    }
    words = pm.vocabulary(model)
    columns = pm.vocabulary({"lm_head": {"kernel": model["embed_tokens"]["weight"]}}).extend(["a"])[0]
    assert columns["lm_head"]["kernel"].tolist() == [[1, 2, 1.5], [3, 4, 3.5]]
    for init, row, bias in (("mean", [2, 3], 3), ("zero", [0, 0], 0), (np.array([[7.0, 9]]), [7, 9], 3)):
        tree, report = words.extend(["a"], init=init)
        assert tree["embed_tokens"]["weight"].tolist() == [[1, 2], [3, 4], row]
        assert tree["lm_head"]["bias"].tolist() == [1, 5, bias]
        assert report.tokens == {"a": 2}
    with pytest.raises(pm.errors.SpecMismatch, match=r"init has the shape \[2, 2\], for 1 rows of 1, 2"):
        words.extend(["a"], init=np.ones((2, 2)))
    with pytest.raises(pm.errors.BadArgument, match="init='means' is not one of mean, subwords, zero"):
        words.extend(["a"], init="means")
    with pytest.raises(pm.errors.Unsupported, match="no tokenizer"):
        words.extend(["a"], init="subwords")


def test_a_token_that_is_there_is_not_new(tmp_path):
    saved(tmp_path, wordpiece())
    words = pm.vocabulary(pm.open(tmp_path))
    for tokens, named in ((["new", "fox"], "fox"), (["new", "new"], "new"), (["</s>"], "</s>")):
        with pytest.raises(pm.errors.BadArgument, match=f"'{named}' is a token already, or is given twice"):
            words.extend(tokens)
    for tokens in ([], [3], [""]):
        with pytest.raises(pm.errors.BadArgument, match="are not texts"):
            words.extend(tokens)


def test_ids_that_are_none():
    words = pm.vocabulary({"embed_tokens": {"weight": np.ones((4, 2))}})
    for ids in ([4], [-1]):
        with pytest.raises(pm.errors.OutOfRange, match=f"there is no token {ids[0]} among 4"):
            words.keep(ids)
    for ids in ([], [1.5], "12", [True]):
        with pytest.raises(pm.errors.BadArgument):
            words.keep(ids)
    with pytest.raises(pm.errors.BadArgument, match="not above 0"):
        words.pad(0)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["bpe", "llama", "wordpiece"])
def test_tokens_of_another_model_keep_the_rows_of_those_that_both_have(tmp_path, kind):
    mine, theirs = bpe(), TOKENIZERS[kind]()
    if kind == "bpe":  # of another corpus, with further tokens at the ends
        theirs.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=300, special_tokens=["<bos>", "<eos>"]))
    model = saved(tmp_path / "m", mine, padding=2, eos_token_id=2)
    saved(tmp_path / "donor", theirs, padding=5, bos_token_id=0, eos_token_id=1 if kind == "bpe" else 2)
    (tmp_path / "m" / "vocab.json").write_text("{}")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "donor" / "tokenizer.json"))
    rows = json.loads((tmp_path / "donor" / "config.json").read_text())["vocab_size"]
    tree, report = pm.vocabulary(pm.open(tmp_path / "m")).transplant(pm.open(tmp_path / "donor"))
    tree.save(tmp_path / "n")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} & {
        file.name for file in (tmp_path / "donor").iterdir()
    }
    assert {name: (tmp_path / "n" / name).read_bytes() for name in names} == {
        name: (tmp_path / "donor" / name).read_bytes() for name in names
    }
    assert not (tmp_path / "n" / "vocab.json").exists()
    new = loaded(tmp_path / "n")
    assert new.config.vocab_size == rows > theirs.get_vocab_size()
    assert new.config.eos_token_id == (1 if kind == "bpe" else 2)
    same = {token.replace("Ġ", "▁" if kind == "llama" else "Ġ"): number for token, number in mine.get_vocab().items()}
    pairs = [(same[token], number) for token, number in theirs.get_vocab().items() if token in same and token.isascii()]
    pairs += [(same[token], n) for token, n in theirs.get_vocab().items() if token in same and token[:1] in "Ġ▁"]
    assert len(pairs) > 20
    old, now = map(torch.tensor, zip(*pairs, strict=True))
    for table in ("model.embed_tokens", "lm_head"):
        before, after = (each.get_submodule(table).weight for each in (model, new))
        assert torch.equal(after[now], before[old])
        close(after[-1], before[: mine.get_vocab_size()].mean(0))
    ids = [report.ids[i] for i in old.tolist()][:9]
    close(new(torch.tensor([ids])).logits[..., now], model(old[None, :9]).logits[..., old])
    assert set(report.tokens.values()).isdisjoint(report.ids.values())


def test_a_token_that_a_donor_lacks_is_named(tmp_path):
    saved(tmp_path / "m", bpe(), image_token_id=300)
    saved(tmp_path / "donor", wordpiece())
    words = pm.vocabulary(pm.open(tmp_path / "m"))
    with pytest.raises(pm.errors.Unsupported, match="names the token 300, and the donor has none like it"):
        words.transplant(pm.open(tmp_path / "donor"))
    with pytest.raises(pm.errors.Unsupported, match=r"each with a tokenizer\.json"):
        words.transplant({"wte": {"weight": np.ones((4, 2))}})
