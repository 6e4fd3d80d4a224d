"""The head that is the embedding, and the head that has a weight of its own: models compute what they did."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from click.testing import CliRunner
from transformers.models.auto import modeling_auto

import paramend as pm
from paramend.anatomy.ties import KNOWN, said, tiable
from paramend.cli.main import cli
from paramend.errors import BadArgument, NoMatch, SpecMismatch, Unsupported

SMALL = {"vocab_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
BART = {"vocab_size": 24, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
BART |= {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("attention_heads", 2), ("ffn_dim", 12))}
GPT2 = {"vocab_size": 24, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
# Family → its class, what its configuration says, and which weights are the embedding or another weight.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", GPT2, {"lm_head.weight"}),
    "gemma": ("GemmaForCausalLM", SMALL | {"num_key_value_heads": 1, "head_dim": 4}, {"lm_head.weight"}),
    "bert": ("BertForMaskedLM", SMALL, {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}),
    "roberta": ("RobertaForMaskedLM", SMALL, {"lm_head.decoder.weight", "lm_head.decoder.bias"}),
    "bart": (
        "BartForConditionalGeneration",
        BART,
        {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"},
    ),
}
TOKENS = torch.arange(1, 7)[None]


def made(family, **says):
    kind, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.CONFIG_MAPPING[family](**config, **says)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(folder, family):
    model, said = getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_untied_and_tied_again(tmp_path, family):
    model, names = made(family), FAMILIES[family][2]
    model.save_pretrained(tmp_path / "old")
    checkpoint = pm.open(tmp_path / "old")
    untied, report = pm.untie(checkpoint)
    assert {row.path for row in report.rows} == names == set(pm.anatomy(checkpoint).ties)
    untied.save(tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert pm.anatomy(pm.open(tmp_path / "own")).ties is None
    own = loaded(tmp_path / "own", family)
    assert torch.equal(logits(own), logits(model))
    assert own.get_output_embeddings().weight is not own.get_input_embeddings().weight
    tied, report = pm.tie(pm.open(tmp_path / "own"))
    assert names >= {row.path for row in report.rows} and len(report.rows) == len(names)
    tied.save(tmp_path / "back")
    old, back = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("old", "back"))
    assert set(old) == set(back) and all(np.array_equal(old[name], back[name]) for name in old)
    again = loaded(tmp_path / "back", family)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_is_untied_and_tied_again(family):
    model, names = made(family), FAMILIES[family][2]
    own, report = pm.untie(model)
    assert {row.path for row in report.rows} == names == set(pm.anatomy(model).ties)
    weights = own.get_output_embeddings().weight, own.get_input_embeddings().weight
    assert weights[0] is not weights[1] and weights[1] is model.get_input_embeddings().weight
    assert (model.config.tie_word_embeddings, own.config.tie_word_embeddings) == (True, False)
    assert torch.equal(logits(own), logits(model)) and pm.anatomy(own).ties is None
    own.tie_weights()
    assert own.get_output_embeddings().weight is weights[0]
    back, _ = pm.tie(own)
    assert set(pm.anatomy(back).ties) == names and back.config.tie_word_embeddings is True
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
    assert torch.equal(logits(back), logits(model))


def test_different_values_are_not_lost(tmp_path):
    model = made("gpt2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "old")
    checkpoint = pm.open(tmp_path / "old")
    with pytest.raises(SpecMismatch, match=r"lm_head.weight .* and transformer.wte.weight .* hold different values"):
        pm.tie(checkpoint)
    with pytest.raises(SpecMismatch):
        pm.tie(model)
    for keep, name in (("embedding", "transformer.wte.weight"), ("head", "lm_head.weight")):
        wanted = model.get_parameter(name)
        tied, _ = pm.tie(checkpoint, keep=keep)
        assert "lm_head.weight" not in tied
        assert np.array_equal(tied["transformer.wte.weight"], wanted.detach().numpy())
        assert torch.equal(pm.tie(model, keep=keep)[0].lm_head.weight, wanted)
    with pytest.raises(BadArgument, match='keep="embedding"'):
        pm.tie(checkpoint, keep="both")


def test_the_embedding_of_a_block_that_predicts_further_tokens_is_another(tmp_path):
    values = {
        name: np.full((4, 2), n, "float32") for n, name in enumerate(("lm_head.weight", "model.embed_tokens.weight"))
    }
    for block in ("model.layers.2", "mtp"):
        copies = {f"{block}.{name}.weight": np.full((4, 2), 7, "float32") for name in ("embed_tokens", "lm_head")}
        for names in ([*copies, *values], [*values, *copies]):  # files have leaves in any order
            tree = {name: (values | copies)[name] for name in names}
            tied, _ = pm.tie(tree, keep="embedding")
            assert set(tree) - set(tied) == {"lm_head.weight"}
            untied, _ = pm.untie(tied, head="lm_head.weight")
            assert untied["lm_head.weight"].tolist() == [[1, 1]] * 4
            pm.save(tied, tmp_path / "model.safetensors", force=True)
            (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
            with pytest.raises(NoMatch, match=r"tied to model\.embed_tokens\.weight"):
                pm.open(tmp_path / "model.safetensors")["lm_head.weight"]


def test_a_stored_head_keeps_its_values(tmp_path):
    """transformers reads a head that is there and differs, whatever the configuration says."""
    model = made("gpt2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "old")
    config = tmp_path / "old/config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    untied, report = pm.untie(pm.open(tmp_path / "old"))
    assert not report.rows and pm.config(untied)["tie_word_embeddings"] is False
    assert np.array_equal(untied["lm_head.weight"], model.lm_head.weight.detach().numpy())


def test_a_head_that_is_no_head():
    tree = {"wte": {"weight": np.ones((3, 2))}, "norm": {"weight": np.ones(2)}}
    for verb in (pm.tie, pm.untie):
        with pytest.raises(SpecMismatch, match=r"norm/weight .* and wte/weight .* cannot be one"):
            verb(tree, head="norm.weight")
        with pytest.raises(BadArgument, match="is no path"):
            verb(tree, head="")


def test_state_dicts_share_a_tensor():
    state = {"wte.weight": torch.ones(3, 2), "lm_head.weight": torch.ones(3, 2), "norm": torch.ones(2)}
    tied, _ = pm.tie(state)
    assert list(tied) == list(state) and tied["lm_head.weight"] is tied["wte.weight"] is state["wte.weight"]
    own, report = pm.untie(tied)
    assert own["lm_head.weight"].data_ptr() != own["wte.weight"].data_ptr() and own["norm"] is state["norm"]
    assert [row.path for row in report.rows] == ["lm_head.weight"]


def test_keys_of_flat_dicts_stay():
    flat = {"wte.weight": np.ones((3, 2)), "a/b": np.ones(1), "norm": np.ones(2)}
    own, report = pm.untie(flat, head="lm_head.weight")
    assert set(own) == {*flat, "lm_head.weight"} and report.rows[0].path == "lm_head.weight"
    assert list(pm.tie(own)[0]) == list(flat)


def test_several_weights_become_the_head(tmp_path):
    model, _ = pm.untie(made("bart"))
    with torch.no_grad():
        model.lm_head.weight += 1
    tied, _ = pm.tie(model, keep="head")
    assert set(pm.anatomy(tied).ties) == FAMILIES["bart"][2] and torch.equal(
        tied.model.shared.weight, model.lm_head.weight
    )
    model.save_pretrained(tmp_path / "old")
    tied, _ = pm.tie(pm.open(tmp_path / "old"), keep="head")
    assert np.array_equal(tied["model.shared.weight"], model.lm_head.weight.detach().numpy())
    assert not FAMILIES["bart"][2] & set(tied)


def test_edits_so_far_are_tied_too(tmp_path):
    made("gpt2").save_pretrained(tmp_path / "old")
    doubled = pm.at(pm.open(tmp_path / "old"), "**.wte.weight").multiply(2.0)
    untied, _ = pm.untie(doubled)
    tied, _ = pm.tie(untied)
    wanted = doubled["transformer.wte.weight"]
    assert np.array_equal(untied["lm_head.weight"], wanted) and np.array_equal(tied["transformer.wte.weight"], wanted)
    with pytest.raises(SpecMismatch):
        pm.tie(pm.at(untied, "lm_head.weight").zero())


def test_what_is_not_known_is_refused(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    safetensors.numpy.save_file({"wte.weight": np.ones((3, 2), "float32")}, folder / "model.safetensors")
    config = {"model_type": "new", "architectures": ["NewForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    for verb in (pm.tie, pm.untie):
        with pytest.raises(Unsupported, match="not known that tie_word_embeddings ties the head of a 'new' model"):
            verb(pm.open(folder))
    untied, _ = pm.untie(pm.open(folder), head="out.weight")
    assert untied["out.weight"].tolist() == [[1.0, 1.0]] * 3 and pm.config(untied)["tie_word_embeddings"] is False
    config["model_type"] = "gpt2"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NoMatch, match="no head with a weight"):
        pm.tie(pm.open(folder))
    with pytest.raises(NoMatch, match="no weights are tied"):
        pm.untie({"wte": {"weight": np.ones((3, 2))}})
    config["model_type"] = "t5"  # the key also scales what the head reads
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="t5"):
        pm.untie(pm.open(folder))
    with pytest.raises(SpecMismatch, match="cannot be one weight"):
        pm.tie({"wte": {"weight": np.ones((3, 2))}, "lm_head": {"weight": np.ones((3, 4))}})


def test_kernels_are_not_embeddings():
    flax = {"wte": {"embedding": np.ones((4, 3))}, "lm_head": {"kernel": np.ones((3, 4))}}
    with pytest.raises(SpecMismatch, match="cannot be one weight"):
        pm.tie(flax)
    with pytest.raises(Unsupported, match="transposed"):
        pm.untie({"wte": flax["wte"]}, head="lm_head/kernel")


def test_commands(tmp_path):
    made("gpt2").save_pretrained(tmp_path / "old")
    run = CliRunner().invoke(cli, ["untie", str(tmp_path / "old"), "-o", str(tmp_path / "own")])
    assert run.exit_code == 0, run.output
    assert "lm_head.weight" in pm.open(tmp_path / "own")
    run = CliRunner().invoke(cli, ["tie", str(tmp_path / "own"), "--keep", "head", "-o", str(tmp_path / "back")])
    assert run.exit_code == 0, run.output
    assert not pm.diff(pm.open(tmp_path / "old"), pm.open(tmp_path / "back"))
    run = CliRunner().invoke(cli, ["tie", str(tmp_path / "old"), "--dry-run"])
    assert run.exit_code == 2 and "there is no head with a weight of its own" in run.output


def test_steps_of_recipes(tmp_path):
    made("gpt2").save_pretrained(tmp_path / "old")
    checkpoint = pm.open(tmp_path / "old")
    untied = pm.Recipe.parse("version: 1\nsteps: [untie: {}, {zero: lm_head.weight}]").apply(checkpoint)
    assert not untied["lm_head.weight"].any() and untied["transformer.wte.weight"].any()
    tied = pm.Recipe.parse("version: 1\nsteps: [untie: {}, tie: {keep: head}]").apply(checkpoint)
    assert tied.paths == checkpoint.paths
    with pytest.raises(pm.errors.BadRecipe, match="hold different values"):
        pm.Recipe.parse("version: 1\nsteps: [tie: {}]").apply(untied)
    with pytest.raises(pm.errors.BadRecipe, match="by at and into alone"):
        pm.Recipe.parse("version: 1\nsteps: [tie: {at: lm_head.weight, keep: head}]").apply(untied)


# Their configurations alone make no model.
UNMADE = {"dbrx", "gemma3n", "ministral", "mllama_text_model", "nemotron", "qwen3_5", "qwen3_5_moe"}
HEADS = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_MASKED_LM")


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_what_families_tie_is_what_transformers_ties(kind):
    config = transformers.CONFIG_MAPPING[kind]
    assert config().tie_word_embeddings is said({"model_type": kind})
    for name in HEADS if kind not in UNMADE else ():
        mapping = getattr(modeling_auto, f"{name}_MAPPING")
        if config in mapping:
            with torch.device("meta"):
                model = mapping[config]._from_config(config(tie_word_embeddings=True))
            tied = dict(model.all_tied_weights_keys)
            paths = dict(enumerate(tuple(name.split(".")) for name in model.state_dict() if name not in tied))
            found = tiable({"model_type": kind}, paths)
            assert {".".join(one): ".".join(of) for one, of in found.items()} == tied
