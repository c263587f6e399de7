"""
python examples/digits/predict.py demo_output/model demo_output/holdout predictions.json

What a user of the saved classifier does, in a process that has seen nothing of its training: Auto classes and a
pipeline, after `import hivit_hf`.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoImageProcessor, AutoModelForImageClassification, logging, pipeline

import hivit_hf  # noqa: F401  registers HiViT with the Auto classes


def predict(model_folder: Path, dataset_folder: Path) -> dict:
    """Labels, probabilities, and the three best classes of a pipeline, for each image of a saved dataset."""
    images = list(load_from_disk(str(dataset_folder))["image"])
    model = AutoModelForImageClassification.from_pretrained(model_folder)
    processor = AutoImageProcessor.from_pretrained(model_folder)
    with torch.no_grad():
        logits = model(**processor([image.convert("RGB") for image in images], return_tensors="pt")).logits
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    probabilities = logits.softmax(dim=1)
    return {
        "labels": [model.config.id2label[index] for index in probabilities.argmax(dim=1).tolist()],
        "probabilities": probabilities.tolist(),
        "pipeline": classify(images, top_k=3, batch_size=64),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Folder of the classifier and its image processor.")
    parser.add_argument("dataset", type=Path, help="Folder of a saved dataset with a column `image`.")
    parser.add_argument("output", type=Path, help="JSON file to write.")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.output.write_text(json.dumps(predict(arguments.model, arguments.dataset)))


if __name__ == "__main__":
    main()
