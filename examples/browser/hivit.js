// The models: ONNX files in a repository's folder, or of examples/export_onnx.py, run by onnxruntime-web. Nothing leaves
// the browser.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

import { checkProcessor, seenBy, toImage, toPixelValues } from "./preprocess.js";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that a static host may not send
ort.env.logLevel = "error";

async function read(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} is not there (${response.status})`);
  return response;
}

// The first of the files that is there.
async function readFirst(urls) {
  for (const url of urls.slice(0, -1)) {
    const response = await fetch(url);
    if (response.ok) return response;
  }
  return read(urls.at(-1));
}

// `files` are the names that the model may have, and `output` is what it must compute.
async function load(folder, files, output) {
  const [config, processor, weights] = await Promise.all([
    read(`${folder}/config.json`).then((r) => r.json()),
    read(`${folder}/preprocessor_config.json`).then((r) => r.json()),
    readFirst(files.map((file) => `${folder}/${file}`)).then((r) => r.arrayBuffer()),
  ]);
  checkProcessor(processor);
  const session = await ort.InferenceSession.create(new Uint8Array(weights), { executionProviders: ["wasm"] });
  if (!session.outputNames.includes(output)) throw new Error(`The model in ${folder} computes no ${output}`);
  return { config, processor, session };
}

// The preprocessing of every model: {seen, pixelValues, tensor}.
function prepare({ processor }, image) {
  const seen = seenBy(processor, image);
  const pixelValues = toPixelValues(processor, seen);
  return { seen, pixelValues, tensor: new ort.Tensor("float32", pixelValues, [1, 3, seen.height, seen.width]) };
}

// As in transformers' pipeline: sigmoid for multi-label classification, softmax otherwise.
function classScores(logits, problemType) {
  if (problemType === "regression") return logits;
  if (problemType === "multi_label_classification" || logits.length === 1) {
    return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
  }
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

export class Classifier {
  static async load(folder) {
    return Object.assign(new Classifier(), await load(folder, ["onnx/model.onnx", "classification.onnx"], "logits"));
  }

  // Whether scores are numbers of any size, and no probabilities.
  get predictsNumbers() {
    return this.config.problem_type === "regression";
  }

  // Classes, most likely first: [{label, score}].
  async classify(image) {
    const { seen, pixelValues, tensor } = prepare(this, image);
    const start = performance.now();
    const logits = (await this.session.run({ pixel_values: tensor })).logits.data;
    const milliseconds = performance.now() - start;
    const scores = classScores(Array.from(logits), this.config.problem_type);
    const classes = scores.map((score, n) => ({ label: this.config.id2label?.[n] ?? `LABEL_${n}`, score }));
    classes.sort((a, b) => b.score - a.score);
    return { seen, pixelValues, logits, classes, milliseconds };
  }
}

export class Autoencoder {
  static async load(folder) {
    return Object.assign(new Autoencoder(), await load(folder, ["onnx/reconstruction.onnx", "reconstruction.onnx"], "reconstruction"));
  }

  get patchSize() {
    return this.config.patch_size;
  }

  // The image with masked units reconstructed. `noise` has one number per unit: the smallest stay visible.
  async reconstruct(image, noise) {
    const { seen, pixelValues, tensor } = prepare(this, image);
    const units = (seen.width / this.patchSize) * (seen.height / this.patchSize);
    noise ??= Float32Array.from({ length: units }, Math.random);
    const start = performance.now();
    const output = await this.session.run({
      pixel_values: tensor,
      noise: new ort.Tensor("float32", noise, [1, units]),
    });
    const milliseconds = performance.now() - start;
    const mask = Array.from(output.bool_masked_pos.data, Boolean);
    const values = output.reconstruction.data;
    const filled = toImage(this.processor, values, seen.width, seen.height);
    return { seen, pixelValues, noise, mask, values, filled, milliseconds };
  }
}
