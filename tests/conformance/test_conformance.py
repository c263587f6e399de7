"""
transformers' own tests of models, backbones and configurations, on the classes of HiViT.

python -m pytest tests/conformance

Its model files add a tester for each model and override what does not fit: so does this one, for an encoder in stages
that sees the visible units only, and whose input embedding is a convolution.
"""

import copy
import unittest

import pytest
import torch
import transformers
from PIL import Image
from transformers import BitImageProcessor, pipeline
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import get_leaf_tensors
from transformers.models.auto import modeling_auto

from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from support.transformers_tests import common_tests, source_distribution


SOURCES = source_distribution()
if SOURCES is None:
    reason = f"no network: the tests of transformers {transformers.__version__} could not be downloaded with pip"
    pytest.skip(reason, allow_module_level=True)
backbones, configurations, models = common_tests(
    SOURCES, "test_backbone_common", "test_configuration_common", "test_modeling_common"
)

BATCH, UNITS, VISIBLE, HEADS, CHANNELS = 7, 16, 8, 4, 64
SMALL = {"image_size": 64, "hidden_size": CHANNELS, "depths": [1, 1, 2], "num_attention_heads": HEADS}
SMALL |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
SMALL |= {"mask_ratio": 0.5, "num_labels": 10}
CLASSES = (HiViTModel, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTBackbone)
# the common tests go by the names of classes
modeling_auto.MODEL_MAPPING_NAMES.setdefault("hivit", "HiViTModel")
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.setdefault("hivit", "HiViTForImageClassification")
modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES.setdefault("hivit", "HiViTForMaskedImageModeling")
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES.setdefault("hivit", "HiViTBackbone")


class CommonInputs:
    """What the common tests ask for a configuration, inputs and sizes."""

    is_training = True
    batch_size, seq_length, mask_length, num_masks = BATCH, UNITS, UNITS, UNITS - VISIBLE
    hidden_size, num_attention_heads, num_hidden_layers, num_labels = CHANNELS, HEADS, 2, 10
    image_size, patch_size, num_channels = 64, 16, 3

    def __init__(self, **changes):
        self.changes = changes

    def get_config(self, **changes) -> HiViTConfig:
        return HiViTConfig(**copy.deepcopy({**SMALL, **self.changes, **changes}))

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": models.floats_tensor([BATCH, 3, 64, 64])}


class TestModels(models.ModelTesterMixin, unittest.TestCase):
    all_model_classes = CLASSES
    test_resize_embeddings = False
    # the test asks for the year in the head of the configuration's file
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = CommonInputs()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """The same mask at each call."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if model_class is HiViTForMaskedImageModeling:
            inputs.pop("bool_masked_pos", None)
            noise = torch.rand(len(inputs["pixel_values"]), UNITS, generator=torch.Generator().manual_seed(0))
            inputs.setdefault("noise", noise)
        return inputs

    def outputs(self, flags: dict):
        """Each class with its output, the flags given to the model, then set in its configuration."""
        for model_class in CLASSES:
            for in_config in (False, True):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                config._attn_implementation = "eager"
                for name, value in flags.items() if in_config else ():
                    setattr(config, name, value)
                model = model_class(config).eval()
                with self.subTest(model_class.__name__, in_config=in_config), torch.no_grad():
                    given = {} if in_config else flags
                    yield model_class, model(**self._prepare_for_class(inputs, model_class), **given)

    def test_attention_outputs(self):
        for model_class, output in self.outputs({"output_attentions": True}):
            units = VISIBLE if model_class is HiViTForMaskedImageModeling else UNITS
            assert [tuple(a.shape) for a in output.attentions] == [(BATCH, HEADS, units, units)] * 2
            assert "hidden_states" not in output

    def test_hidden_states_output(self):
        for model_class, output in self.outputs({"output_hidden_states": True}):
            units = (BATCH, VISIBLE if model_class is HiViTForMaskedImageModeling else UNITS)
            stages = (
                [(*units, 4, 4, CHANNELS // 4)] * 3 + [(*units, 2, 2, CHANNELS // 2)] * 2 + [(*units, CHANNELS)] * 2
            )
            assert [tuple(h.shape) for h in output.hidden_states] == stages

    def test_model_outputs_equivalence(self):
        """Boolean outputs have no difference, which the common test takes."""
        for flags in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
            for model_class in CLASSES:
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                inputs = self._prepare_for_class(inputs, model_class, return_labels=True)
                model = model_class(config).eval()
                with self.subTest(model_class.__name__, **flags), torch.no_grad():
                    as_tuple = model(**inputs, **flags, return_dict=False)
                    assert isinstance(as_tuple, tuple)
                    torch.testing.assert_close(as_tuple, model(**inputs, **flags).to_tuple())

    def test_model_get_set_embeddings(self):
        for model_class in CLASSES:
            model, other = model_class(self.model_tester.get_config()), torch.nn.Conv2d(3, CHANNELS // 4, 4, 4)
            assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d) and model.get_output_embeddings() is None
            model.set_input_embeddings(other)
            assert model.get_input_embeddings() is other

    def test_exporter(self):
        """In place of the tests of exporters, which the source distribution lacks."""
        for model_class in CLASSES:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            inputs = self._prepare_for_class(inputs, model_class)
            model = model_class(config).eval()
            with self.subTest(model_class.__name__), torch.no_grad():
                config = DynamoConfig(dynamic=False)
                exported = DynamoExporter().export(model, copy.copy(inputs), config=config)
                exported = exported.module() if hasattr(exported, "module") else exported
                found, expected = (list(get_leaf_tensors(run(**inputs)).values()) for run in (exported, model))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestBackbone(backbones.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (HiViTBackbone,)
    config_class = HiViTConfig
    has_attentions = True
    stages = ["stage1", "stage2", "stage3"]

    def setUp(self):
        self.model_tester = CommonInputs(out_features=self.stages)


class TestPooledBackbone(TestBackbone):
    """With the options that detectors and segmenters set."""

    stages = ["stage1", "stage2", "stage3", "stage4"]

    def setUp(self):
        self.model_tester = CommonInputs(out_features=self.stages, add_pooled_stage=True, apply_layernorm=True)


class TestConfiguration(unittest.TestCase):
    def test_config(self):
        names = ["hidden_size", "num_attention_heads", "num_hidden_layers", "image_size"]
        configurations.ConfigTester(
            self, config_class=HiViTConfig, has_text_modality=False, common_properties=names, hidden_size=64
        ).run_common_tests()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("task", "model_class"),
    [("image-classification", HiViTForImageClassification), ("image-feature-extraction", HiViTModel)],
)
def test_pipelines(task, model_class, dtype, tmp_path):
    """In place of the tests of pipelines, which the source distribution lacks."""
    model_class(HiViTConfig(**SMALL)).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    predict = pipeline(task, model=str(tmp_path), dtype=dtype)
    images = [Image.new("RGB", (80, 72), "red"), Image.linear_gradient("L")]
    one, several = predict(images[0]), predict(images * 3, batch_size=4)
    assert len(several) == 6
    if task == "image-classification":
        assert len(one) == 5 and {row["label"] for row in one} <= set(predict.model.config.label2id)
    else:
        assert torch.tensor(one).shape == (1, UNITS, CHANNELS)
