"""The network against the oracle, and what users may do with it."""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from hivit_hf import (
    HiViTBackbone,
    HiViTConfig,
    HiViTForImageClassification,
    HiViTForMaskedImageModeling,
    HiViTModel,
    modeling_hivit,
    units_to_map,
)
from hivit_hf.modeling_hivit import HiViTAttention, image_to_pixels, pixels_to_image, sin_cos_position_embeddings
from oracle import Oracle


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
VARIANTS = pytest.mark.parametrize(
    "variant",
    [
        {"use_relative_position_bias": True, "fuse_stages": True},
        {"use_relative_position_bias": False, "fuse_stages": True},
        {"use_relative_position_bias": True, "fuse_stages": False},
        {"use_relative_position_bias": False, "fuse_stages": False, "norm_pix_loss": False},
        {"use_absolute_position_embeddings": False, "qkv_bias": False, "early_blocks_per_depth": 1},
        {"patch_size": 8, "image_size": [32, 24], "num_channels": 1, "decoder_mlp_ratio": 2.0, "early_mlp_ratio": 2.0},
    ],
    ids=["bias-fused", "fused", "bias", "plain", "no-positions", "small-units"],
)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def make(model_class, config, redraw, dtype=torch.float32, implementation="eager"):
    config._attn_implementation = implementation
    torch.set_default_dtype(dtype)
    try:
        return redraw(model_class(config)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def images(config, batch_size, dtype=torch.float32, size=None):
    height, width = size or (length * config.patch_size for length in config.grid_size)
    pixel_values = torch.randn(batch_size, config.num_channels, height, width, dtype=dtype)
    pixel_values[0, :, : config.patch_size, : config.patch_size] = 0  # a unit without variance shows a wrong epsilon
    return pixel_values


def labeled(name):
    """The message of a failed comparison, with the name of what was compared."""
    return lambda message: f"{name}: {message}"


def assert_gradients_equal(model, loss, oracle_loss, weights, dtype):
    """Gradients of all parameters, relative to the largest of each. The key bias has none but rounding."""
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(oracle_loss, [weights[name] for name in trained], allow_unused=True)
    for (name, parameter), gradient in zip(trained.items(), expected):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        scale = max(gradient.abs().max().item(), 1e-2)
        assert_close(parameter.grad / scale, gradient / scale, atol=TOLERANCE[dtype], rtol=0, msg=labeled(name))


# -- the oracle -----------------------------------------------------------------------------------------------------


@VARIANTS
@PRECISIONS
@IMPLEMENTATIONS
def test_masked_image_modeling_equals_the_oracle(variant, dtype, implementation, tiny_config, redraw, draw_masks):
    config = tiny_config(**variant)
    model = make(HiViTForMaskedImageModeling, config, redraw, dtype, implementation)
    pixel_values = images(config, 2, dtype)
    num_units = math.prod(config.grid_size)
    masks = draw_masks(2, num_units, num_units - 5)
    output = model(pixel_values, bool_masked_pos=masks)

    weights = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    oracle = Oracle(weights, config)
    expected = torch.stack([oracle.predict(image, mask) for image, mask in zip(pixel_values, masks)])
    assert_close(output.logits, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    expected_loss = oracle.loss(pixel_values, masks)
    assert_close(output.loss, expected_loss, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_gradients_equal(model, output.loss, expected_loss, weights, dtype)


@VARIANTS
@PRECISIONS
@IMPLEMENTATIONS
def test_classifier_equals_the_oracle(variant, dtype, implementation, tiny_config, redraw):
    config = tiny_config(**variant)
    model = make(HiViTForImageClassification, config, redraw, dtype, implementation)
    pixel_values = images(config, 2, dtype)
    logits = model(pixel_values).logits

    weights = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    oracle = Oracle(weights, config)
    expected = torch.stack([oracle.classify(image) for image in pixel_values])
    assert_close(logits, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_gradients_equal(model, logits.square().sum(), expected.square().sum(), weights, dtype)


def test_classifier_without_some_units_equals_the_oracle(tiny_config, redraw, draw_masks):
    model = make(HiViTForImageClassification, tiny_config(), redraw)
    pixel_values, masks = images(model.config, 2), draw_masks(2, 16, 6)
    oracle = Oracle(model.state_dict(), model.config)
    expected = torch.stack([oracle.classify(image, mask) for image, mask in zip(pixel_values, masks)])
    assert_close(model(pixel_values, bool_masked_pos=masks).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@PRECISIONS
def test_every_stage_equals_the_oracle(masked, dtype, tiny_config, redraw, draw_masks):
    config = tiny_config()
    model = make(HiViTModel, config, redraw, dtype)
    pixel_values = images(config, 2, dtype)
    masks = draw_masks(2, 16, 9) if masked else [None, None]
    output = model(pixel_values, bool_masked_pos=masks if masked else None, output_stage_hidden_states=True)

    oracle = Oracle({f"hivit.{name}": w for name, w in model.state_dict().items()}, config)
    for n in range(2):
        expected = oracle.encode(pixel_values[n], masks[n])
        for stage, hidden_states in zip(config.stage_names, output.stage_hidden_states):
            assert_close(hidden_states[n], expected[stage], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        pooled = oracle.pooled(pixel_values[n], masks[n])
        assert_close(output.pooler_output[n], pooled, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("size", "num_channels"),
    [((160, 160), 1), ((160, 160), 4), ((224, 224), 3), ((256, 192), 3), ((384, 384), 3)],
    ids=str,
)
def test_sizes_and_channels_equal_the_oracle(size, num_channels, tiny_config, redraw, draw_masks):
    small = {"hidden_size": 16, "depths": [1, 1, 1], "num_attention_heads": 1, "decoder_num_hidden_layers": 1}
    config = tiny_config(image_size=224, num_channels=num_channels, decoder_num_attention_heads=1, **small)
    model = make(HiViTForMaskedImageModeling, config, redraw)
    pixel_values = images(config, 1, size=size)
    num_units = math.prod(size) // 256
    masks = draw_masks(1, num_units, num_units * 3 // 4)
    output = model(pixel_values, bool_masked_pos=masks)
    oracle = Oracle(model.state_dict(), config)
    full = model.hivit(pixel_values).last_hidden_state
    assert_close(full[0], oracle.encode(pixel_values[0])["stage3"], atol=1e-5, rtol=1e-5)
    assert output.reconstruction.shape == pixel_values.shape
    expected = oracle.predict(pixel_values[0], masks[0])
    assert_close(output.logits[0], expected, atol=1e-5, rtol=1e-5)


# -- what follows from the network --------------------------------------------------------------------------------


@IMPLEMENTATIONS
def test_masking_nothing_equals_the_plain_encoder(implementation, tiny_config, redraw):
    model = make(HiViTModel, tiny_config(), redraw, implementation=implementation)
    pixel_values = images(model.config, 2)
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    assert_close(model(pixel_values, bool_masked_pos=nothing).last_hidden_state, model(pixel_values).last_hidden_state)


def test_masked_pixels_are_never_read(tiny_config, redraw, draw_masks):
    model = make(HiViTModel, tiny_config(), redraw)
    pixel_values = images(model.config, 2)
    masks = draw_masks(2, 16, 12)
    expected = model(pixel_values, bool_masked_pos=masks).last_hidden_state
    hidden = image_to_pixels(pixel_values, 16)
    hidden[masks] = float("nan")
    poisoned = pixels_to_image(hidden, 16, (4, 4))
    assert_close(model(poisoned, bool_masked_pos=masks).last_hidden_state, expected, atol=0, rtol=0)


def test_nothing_masked_has_loss_zero_with_a_graph(tiny_config):
    model = HiViTForMaskedImageModeling(tiny_config())
    output = model(images(model.config, 2), bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_backbone_maps_equal_the_stage_outputs(tiny_config, redraw):
    config = tiny_config(image_size=[64, 96], out_features=["stem", "stage1", "stage2", "stage3"])
    backbone = make(HiViTBackbone, config, redraw)
    pixel_values = images(config, 2)
    stages = backbone.hivit(pixel_values, output_stage_hidden_states=True).stage_hidden_states
    maps = backbone(pixel_values).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 24), (2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6)]
    assert backbone.channels == [8, 8, 16, 32]
    for stage, feature_map in zip(stages, maps):
        side = feature_map.shape[2] // 4
        for row, column in [(0, 0), (1, 5), (3, 2)]:
            unit = stage[:, row * 6 + column].reshape(2, side, side, -1).permute(0, 3, 1, 2)
            here = feature_map[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert_close(here, unit, atol=0, rtol=0)


def test_hidden_states_and_attentions(tiny_config, redraw, draw_masks):
    model = make(HiViTForMaskedImageModeling, tiny_config(), redraw)
    pixel_values, masks = images(model.config, 2), draw_masks(2, 16, 12)
    output = model(pixel_values, bool_masked_pos=masks, output_hidden_states=True, output_attentions=True)
    stages = model.hivit(pixel_values, masks, output_stage_hidden_states=True).stage_hidden_states
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1 == 7
    for index, stage in zip([0, 2, 4, 6], stages):
        assert_close(output.hidden_states[index], stage, atol=0, rtol=0)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 4, 4)] * 2
    assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 4))


@pytest.mark.parametrize(
    "model_class", [HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification, HiViTBackbone]
)
def test_tuples_hold_what_the_named_output_holds(model_class, tiny_config):
    model = model_class(tiny_config()).eval()
    pixel_values, noise = images(model.config, 2), {}
    if model_class is HiViTForMaskedImageModeling:
        noise = {"noise": torch.rand(2, 16)}
    expected = model(pixel_values, **noise).to_tuple()
    model.config.return_dict = False
    for output in (model(pixel_values, **noise), model(pixel_values, return_dict=False, **noise)):
        assert type(output) is tuple
        assert_close(output, expected, atol=0, rtol=0)


@pytest.mark.parametrize("model_class", [HiViTModel, HiViTForMaskedImageModeling, HiViTBackbone])
def test_attentions_that_there_are_not_are_told(model_class, tiny_config, monkeypatch):
    model, told = model_class(tiny_config()).eval(), []
    monkeypatch.setattr(modeling_hivit.logger, "warning_once", told.append)
    assert model.config._attn_implementation == "sdpa"
    assert not model(images(model.config, 1), output_attentions=True).attentions
    assert "sdpa gives no attentions" in told[0] and 'set_attn_implementation("eager")' in told[0]
    told.clear()
    model.set_attn_implementation("eager")
    assert len(model(images(model.config, 1), output_attentions=True).attentions) == 2
    assert not told


@pytest.mark.parametrize("model_class", [HiViTForMaskedImageModeling, HiViTForImageClassification, HiViTBackbone])
def test_linear_layers_get_three_dimensions(model_class, tiny_config):
    """Those of 8-bit quantization take no more."""
    model, dimensions = model_class(tiny_config()).eval(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: dimensions.append(inputs[0].ndim))
    model(images(model.config, 2))
    assert dimensions and max(dimensions) <= 3


def test_units_become_maps(tiny_config, redraw):
    model, size = make(HiViTModel, tiny_config(), redraw), (32, 48)
    pixel_values = images(model.config, 2, size=size)
    backbone = HiViTBackbone(tiny_config(out_features=["stem", "stage1", "stage2", "stage3"])).eval()
    backbone.hivit.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        output = model(pixel_values, output_stage_hidden_states=True)
        maps = backbone(pixel_values).feature_maps
    for stage, expected in zip(output.stage_hidden_states, maps):
        assert_close(units_to_map(stage, (2, 3)), expected)
    assert_close(model.units_to_map(output.last_hidden_state, grid=(2, 3)), maps[3])
    assert units_to_map(torch.zeros(1, 16, 8)).shape == (1, 8, 4, 4)
    for units, grid in [(6, None), (6, (2, 2)), (4, (3, 2))]:
        with pytest.raises(ValueError, match=rf"units needs \d of them, got {units}: give grid as \(rows, columns\)"):
            units_to_map(torch.zeros(1, units, 8), grid)


def test_noise_keeps_the_smallest_and_a_mask_wins(tiny_config, draw_masks):
    model = HiViTForMaskedImageModeling(tiny_config(mask_ratio=0.7)).eval()
    pixel_values, noise = images(model.config, 2), torch.rand(2, 16)
    drawn = model(pixel_values, noise=noise).bool_masked_pos
    kept = noise.argsort(dim=1)[:, : int(16 * (1 - 0.7))]
    assert (~drawn).sum(1).tolist() == [4, 4]
    assert not drawn.gather(1, kept).any()
    given = draw_masks(2, 16, 3)
    assert torch.equal(model(pixel_values, bool_masked_pos=given, noise=noise).bool_masked_pos, given)
    assert not torch.equal(model(pixel_values).bool_masked_pos, model(pixel_values).bool_masked_pos)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruct_brings_predictions_back_to_pixels(norm_pix_loss, tiny_config, draw_masks):
    model = HiViTForMaskedImageModeling(tiny_config(norm_pix_loss=norm_pix_loss)).eval()
    pixel_values, masks = images(model.config, 2), draw_masks(2, 16, 12)
    truth = model.target(pixel_values).flatten(0, 1)
    model.decoder.forward = lambda *args, **kwargs: truth.view(2, 16, -1)  # a decoder that is always right
    image = model.reconstruct(pixel_values, bool_masked_pos=masks)
    assert_close(image, pixel_values, atol=1e-4, rtol=1e-4)
    model.decoder.forward = lambda *args, **kwargs: torch.full((2, 16, 768), 100.0)
    wrong = image_to_pixels(model.reconstruct(pixel_values, bool_masked_pos=masks), 16)
    assert_close(wrong[~masks], image_to_pixels(pixel_values, 16)[~masks], atol=0, rtol=0)
    assert (wrong[masks] != image_to_pixels(pixel_values, 16)[masks]).all()


@pytest.mark.parametrize("rate", [0.5])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(rate, tiny_config):
    model = HiViTModel(tiny_config(drop_path_rate=rate))
    layers = [layer for stage in model.stages for layer in stage.layers]
    rates = [layer.drop_path.rate for layer in layers]
    assert_close(torch.tensor(rates), torch.linspace(0, rate, 6))
    branch = torch.ones(4000, 3, 2)
    dropped = layers[-1].drop_path.train()(branch)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1, :1]).all()
    assert abs(dropped.mean().item() - 1) < 0.1
    assert_close(layers[-1].drop_path.eval()(branch), branch)


# -- initialization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"), [("tiny", 19_181_668), ("small", 37_526_464), ("base", 66_418_952), ("large", 288_493_576)]
)
def test_parameter_counts_of_the_classifiers(name, count):
    with torch.device("meta"):
        model = HiViTForImageClassification(HiViTConfig.from_architecture(name, num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == count


def test_parameter_counts_of_the_masked_autoencoder():
    with torch.device("meta"):
        model = HiViTForMaskedImageModeling(HiViTConfig.from_architecture("base-mae"))
    assert sum(p.numel() for p in model.parameters()) == 87_041_152
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 86_940_800


def test_initialization_is_the_published_one(tiny_config):
    config = tiny_config(hidden_size=128, decoder_num_attention_heads=2)
    model = HiViTForMaskedImageModeling(config)
    fc1 = model.hivit.stages[2].layers[0].mlp.fc1
    assert abs(fc1.weight.std().item() - 0.02) < 0.001
    assert not fc1.bias.any()
    bound = 1 / math.sqrt(3 * 16)
    projection = model.hivit.embeddings.projection
    assert bound * 0.95 < projection.weight.abs().max() <= bound
    assert 0 < projection.bias.abs().max() <= bound
    assert not model.hivit.stages[2].layers[0].attention.relative_position_bias_table.any()
    assert abs(model.decoder.mask_token.std().item() - 0.02) < 0.01
    assert_close(model.hivit.position_embeddings.data, sin_cos_position_embeddings((4, 4), 128).float())
    assert_close(model.decoder.position_embeddings.data, sin_cos_position_embeddings((4, 4), 24).float())
    assert model.hivit.position_embeddings.requires_grad
    assert not model.decoder.position_embeddings.requires_grad
    classifier = HiViTForImageClassification(config)
    assert abs(classifier.hivit.position_embeddings.std().item() - 0.02) < 0.002


@pytest.mark.parametrize(
    "model_class", [HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification, HiViTBackbone]
)
def test_the_input_embedding_is_the_projection(model_class, tiny_config):
    model, other = model_class(tiny_config()), torch.nn.Conv2d(3, 8, 4, 4)
    assert model.get_input_embeddings() is model.base_model.embeddings.projection
    model.set_input_embeddings(other)
    assert model.base_model.embeddings.projection is other


# -- precision, attention, compilation --------------------------------------------------------------------------


@VARIANTS
def test_bfloat16_is_close_and_trains(variant, tiny_config, draw_masks):
    config = tiny_config(**variant)
    model = HiViTForMaskedImageModeling(config)
    pixel_values, num_units = images(config, 2), math.prod(config.grid_size)
    masks = draw_masks(2, num_units, num_units // 2)
    expected = model(pixel_values, bool_masked_pos=masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(pixel_values, bool_masked_pos=masks)
    pure = copy.deepcopy(model).to(torch.bfloat16)(pixel_values, bool_masked_pos=masks)
    for output in (mixed, pure):
        assert output.loss.dtype == torch.float32
        assert_close(output.loss, expected.loss, atol=0.02, rtol=0.02)
        output.loss.backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("capability", "bfloat16", "written_out"),
    [("AVX512", True, {True, False}), ("AVX512", False, {True}), ("AVX2", False, {}), ("DEFAULT", False, {})],
)
def test_half_precision_writes_attention_out_where_that_is_faster(
    capability, bfloat16, written_out, training, tiny_config, monkeypatch
):
    """SDPA is slower than explicit attention on CPUs with AVX-512 in bfloat16, and faster elsewhere."""
    monkeypatch.setattr(modeling_hivit, "CPU_CAPABILITY", capability)
    monkeypatch.setattr(modeling_hivit, "CPU_MULTIPLIES_BFLOAT16", bfloat16)
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    model = HiViTModel(tiny_config()).train(training)
    assert model.config._attn_implementation == "sdpa"
    model(images(model.config, 1))
    assert len(calls) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images(model.config, 1))
    assert len(calls) == (2 if training in written_out else 4)


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_flex_attention_is_refused_on_cpus_where_it_is_wrong(capability, tiny_config, monkeypatch):
    monkeypatch.setattr(modeling_hivit, "CPU_CAPABILITY", capability)
    model = HiViTModel(tiny_config()).eval()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=rf"flex_attention is not correct .* has {capability}: load .*\"sdpa\""):
        model(images(model.config, 1))


@pytest.mark.skipif(modeling_hivit.CPU_CAPABILITY != "AVX512", reason="refused without AVX-512")
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_flex_attention_gives_each_head_its_own_bias(masked, tiny_config, redraw, draw_masks):
    config = tiny_config(hidden_size=64)
    model = make(HiViTModel, config, redraw)
    pixel_values, masks = images(config, 2), draw_masks(2, 16, 8) if masked else None
    with torch.no_grad():
        expected = model(pixel_values, masks).last_hidden_state
        model.set_attn_implementation("flex_attention")
        assert_close(model(pixel_values, masks).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


WINDOWS = {"window_size": 3, "global_attention_layers": [1], "image_size": 64}


@pytest.mark.parametrize("size", [(48, 96), (80, 112), (32, 64)], ids=str)
@pytest.mark.parametrize("use_relative_position_bias", [True, False], ids=["relative", "no_relative"])
@pytest.mark.parametrize("attend_to_window_padding", [True, False], ids=["padding", "smaller"])
def test_windows_equal_the_oracle(attend_to_window_padding, use_relative_position_bias, size, tiny_config, redraw):
    """Sizes that windows of 3 units fill, do not fill, and that are smaller than one."""
    changes = {"use_relative_position_bias": use_relative_position_bias, "depths": [1, 1, 3]}
    config = tiny_config(**WINDOWS, **changes, attend_to_window_padding=attend_to_window_padding)
    model = make(HiViTModel, config, redraw, torch.float64)
    pixel_values = torch.randn(2, config.num_channels, *size, dtype=torch.float64)
    oracle = Oracle({f"hivit.{name}": w for name, w in model.state_dict().items()}, config)
    expected = torch.stack([oracle.encode(image)["stage3"] for image in pixel_values])
    assert_close(model(pixel_values).last_hidden_state, expected, atol=1e-10, rtol=1e-10)


def test_windows_compile_export_and_train(tiny_config, redraw):
    model = make(HiViTBackbone, tiny_config(**WINDOWS, depths=[1, 1, 3]), redraw)
    pixel_values = torch.randn(2, model.config.num_channels, 80, 112)
    (expected,) = model(pixel_values).feature_maps
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values)
    assert_close(compiled.feature_maps[0], expected, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(model, (pixel_values,)).module()(pixel_values)
    assert_close(exported.feature_maps[0], expected, atol=1e-5, rtol=1e-5)
    expected.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.set_attn_implementation("eager")
    assert [a.shape for a in model(pixel_values, output_attentions=True).attentions] == [
        (2, 4, 35, 35)
    ]  # the global one


def test_a_window_as_large_as_the_image_changes_nothing(tiny_config, redraw):
    config = tiny_config()
    model = make(HiViTModel, config, redraw)
    windowed = HiViTModel(tiny_config(window_size=4)).eval()
    windowed.load_state_dict(model.state_dict())
    pixel_values = images(config, 2)
    assert_close(windowed(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


def test_flash_attention_refuses_the_relative_bias(tiny_config):
    attention = HiViTAttention(tiny_config(), 32, 4, use_relative_position_bias=True)
    attention.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2 cannot add .* attn_implementation=\"sdpa\""):
        attention(torch.randn(1, 16, 32), torch.zeros(16, 16, dtype=torch.long), (4, 4))


def test_compiles_without_graph_breaks(tiny_config, redraw, draw_masks):
    config = tiny_config(mask_ratio=0.75)
    pixel_values, noise, masks = images(config, 2), torch.rand(2, 16), draw_masks(2, 16, 12)
    pretraining = make(HiViTForMaskedImageModeling, config, redraw, implementation="sdpa")
    classifier = make(HiViTForImageClassification, config, redraw, implementation="sdpa")
    for model, inputs in [
        (pretraining, {"bool_masked_pos": masks}),
        (pretraining.hivit, {"bool_masked_pos": masks, "output_hidden_states": True}),
        (classifier, {"labels": torch.tensor([1, 3])}),
    ]:
        torch._dynamo.reset()
        expected = model(pixel_values, **inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values, **inputs)
        for name, value in expected.items():
            assert_close(compiled[name], value, atol=1e-5, rtol=1e-5, msg=labeled(name))

    torch._dynamo.reset()
    compiled = torch.compile(pretraining, fullgraph=True)  # inductor, forward and backward
    loss = compiled(pixel_values, noise=noise).loss
    loss.backward()
    gradients = [p.grad.clone() for p in pretraining.parameters() if p.requires_grad]
    pretraining.zero_grad()
    expected_loss = pretraining(pixel_values, noise=noise).loss
    expected_loss.backward()
    assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(gradients, (p for p in pretraining.parameters() if p.requires_grad)):
        assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_class", [HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification])
@pytest.mark.parametrize(("known", "asserted"), [(None, 1), (4, 0)], ids=["ratio", "number"])
def test_a_mask_on_a_gpu_is_not_waited_for(known, asserted, model_class, tiny_config):
    """Fake tensors have a device without a GPU, and refuse to be read, which is what would wait."""
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        model = model_class(tiny_config(mask_ratio=0.75))
        for name, parameter in list(model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = torch.nn.Parameter(parameter.detach().to("cuda"))
        masks = torch.zeros(2, 16, dtype=torch.bool, device="cuda")
        with Operations() as operations:
            model(torch.zeros(2, 3, 64, 64, device="cuda"), bool_masked_pos=masks, num_visible_units=known)
    assert operations.names.count("aten::_assert_async.msg") == asserted
    assert "aten::_local_scalar_dense" not in operations.names


@pytest.mark.parametrize("model_class", [HiViTForMaskedImageModeling, HiViTForImageClassification])
def test_the_number_of_visible_units_may_be_given(model_class, tiny_config, draw_masks):
    model = model_class(tiny_config()).eval()
    pixel_values, masks = images(model.config, 2), draw_masks(2, 16, 6)
    expected = model(pixel_values, bool_masked_pos=masks).logits
    assert torch.equal(model(pixel_values, bool_masked_pos=masks, num_visible_units=10).logits, expected)
    with pytest.raises(ValueError, match=r"num_visible_units \(10\) needs bool_masked_pos"):
        model(pixel_values, num_visible_units=10)


@pytest.mark.parametrize("num_masked", [8, 15])
def test_compiled_loss_follows_what_was_masked(num_masked, tiny_config, redraw, draw_masks):
    """A given mask is not checked when compiled: with another ratio than the configuration's, its own is used."""
    model = make(HiViTForMaskedImageModeling, tiny_config(mask_ratio=0.75), redraw)
    pixel_values, masks = images(model.config, 2), draw_masks(2, 16, num_masked)
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True, backend="eager")(pixel_values, bool_masked_pos=masks)
    assert output.bool_masked_pos.sum(dim=1).tolist() == [12, 12]
    assert_close(output.loss, model(pixel_values, bool_masked_pos=output.bool_masked_pos).loss)


def test_exports_the_full_and_the_masked_path(tiny_config, redraw, draw_masks):
    config = tiny_config(mask_ratio=0.75)
    pixel_values = images(config, 2)
    pretraining = make(HiViTForMaskedImageModeling, config, redraw)
    classifier = make(HiViTForImageClassification, config, redraw)
    for model, first, second in [
        (classifier, {}, {}),
        (pretraining, {"noise": torch.rand(2, 16)}, {"noise": torch.rand(2, 16)}),
        (pretraining.hivit, {"bool_masked_pos": draw_masks(2, 16, 12)}, {"bool_masked_pos": draw_masks(2, 16, 12)}),
    ]:
        program = torch.export.export(model, (pixel_values,), first)
        others = images(config, 2)
        expected = model(others, **second)
        exported = program.module()(others, **second)
        for name, value in expected.items():
            assert_close(exported[name], value, atol=1e-5, rtol=1e-5, msg=labeled(name))


@pytest.mark.parametrize("use_relative_position_bias", [True, False], ids=["relative", "no_relative"])
@pytest.mark.parametrize("model_class", [HiViTForImageClassification, HiViTBackbone])
def test_exports_for_any_size_from_an_example_of_its_own(model_class, use_relative_position_bias, tiny_config, redraw):
    """The example has the very size of the configuration, and does not bind the program to it."""
    model = make(model_class, tiny_config(use_relative_position_bias=use_relative_position_bias), redraw)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(model, (images(model.config, 2),), dynamic_shapes={"pixel_values": sizes})
    for size in [(64, 64), (32, 48), (112, 80)]:
        pixel_values = images(model.config, 3, size=size)
        expected = model(pixel_values)
        for one, other in zip(program.module()(pixel_values).to_tuple(), expected.to_tuple()):
            assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, tiny_config):
    model = HiViTForMaskedImageModeling(tiny_config()).train()
    pixel_values, noise = images(model.config, 2).requires_grad_(), torch.rand(2, 16)
    model(pixel_values, noise=noise).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    layer = model.hivit.stages[2].layers[0]
    layer.norm1.register_forward_hook(lambda *_: calls.append(1))
    model(pixel_values, noise=noise).loss.backward()
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], msg=labeled(name))


@pytest.mark.parametrize(
    ("problem_type", "labels", "reference"),
    [
        ("single_label_classification", torch.tensor([1, 4]), torch.nn.functional.cross_entropy),
        (
            "multi_label_classification",
            torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]),
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
        ("regression", torch.randn(2, 5), torch.nn.functional.mse_loss),
    ],
)
def test_problem_types(problem_type, labels, reference, tiny_config):
    model = HiViTForImageClassification(tiny_config(problem_type=problem_type)).eval()
    output = model(images(model.config, 2), labels=labels)
    assert_close(output.loss, reference(output.logits, labels))
