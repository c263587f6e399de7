// The page: an image is dropped, chosen or pasted; it is classified, masked and reconstructed.

import { Autoencoder, Classifier } from "./hivit.js";

const MAX_MEGAPIXELS = 64;
const MAX_SIDE_RATIO = 100;
const GRAY = 140;
const part = (id) => document.getElementById(id);
const models = {};
let current = null;
let turn = 0;

// -- images

// Three bytes per pixel of a file that a browser can show; transparent parts become white. Throws words for people.
async function readImage(file) {
  if (!file.size) throw new Error("The file is empty.");
  const url = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = url;
    const unreadable = "This is not an image that the browser can read. Try a PNG, JPEG, GIF or WebP file.";
    await new Promise((resolve, reject) => {
      image.onload = resolve; // only its size is known then
      image.onerror = () => reject(new Error(unreadable));
    });
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    if (!width || !height) throw new Error("The image has no size of its own. Try a PNG, JPEG, GIF or WebP file.");
    if (width * height > MAX_MEGAPIXELS * 1e6) {
      const megapixels = Math.round((width * height) / 1e6);
      throw new Error(`The image is too large: ${megapixels} megapixels, at most ${MAX_MEGAPIXELS} are read.`);
    }
    if (Math.max(width, height) > MAX_SIDE_RATIO * Math.min(width, height)) {
      throw new Error(`The image is too long and thin: ${width}x${height} px. Crop it.`);
    }
    await image.decode().catch(() => {
      throw new Error(unreadable);
    });
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(image, 0, 0);
    const rgba = context.getImageData(0, 0, width, height).data;
    const data = new Uint8ClampedArray(width * height * 3);
    for (let i = 0, j = 0; i < rgba.length; i += 4, j += 3) {
      data[j] = rgba[i];
      data[j + 1] = rgba[i + 1];
      data[j + 2] = rgba[i + 2];
    }
    return { width, height, data };
  } finally {
    URL.revokeObjectURL(url);
  }
}

function draw(canvas, { width, height, data }) {
  canvas.width = width;
  canvas.height = height;
  const rgba = new ImageData(width, height);
  for (let i = 0, j = 0; i < rgba.data.length; i += 4, j += 3) {
    rgba.data.set([data[j], data[j + 1], data[j + 2], 255], i);
  }
  canvas.getContext("2d").putImageData(rgba, 0, 0);
  canvas.classList.toggle("pixelated", width < 128);
}

function maskUnits(canvas, mask, patchSize) {
  const context = canvas.getContext("2d");
  const columns = canvas.width / patchSize;
  context.fillStyle = `rgb(${GRAY} ${GRAY} ${GRAY})`;
  mask.forEach((masked, unit) => {
    if (!masked) return;
    context.fillRect((unit % columns) * patchSize, Math.floor(unit / columns) * patchSize, patchSize, patchSize);
  });
}

// -- results

function say(text, isError = false) {
  part("status").textContent = text;
  part("status").classList.toggle("error", isError);
}

function showClasses({ classes, seen, milliseconds }, areNumbers) {
  draw(part("seen"), seen);
  part("classes").replaceChildren(
    ...classes.slice(0, 5).map(({ label, score }) => {
      const row = document.createElement("li");
      const [name, bar, number] = ["span", "meter", "output"].map((tag) => document.createElement(tag));
      name.textContent = label;
      bar.value = score;
      bar.style.visibility = areNumbers ? "hidden" : "visible";
      number.textContent = areNumbers ? score.toPrecision(4) : `${(100 * score).toFixed(1)} %`;
      row.append(name, bar, number);
      return row;
    }),
  );
  part("classify-time").textContent = `${milliseconds.toFixed(0)} ms on this device`;
  part("classification").hidden = false;
}

function showReconstruction({ seen, mask, filled, milliseconds }, patchSize) {
  draw(part("original"), seen);
  draw(part("masked"), seen);
  maskUnits(part("masked"), mask, patchSize);
  draw(part("filled"), filled);
  const maskRatio = mask.filter(Boolean).length / mask.length;
  part("masked-caption").textContent = `visible patches: ${Math.round(100 * (1 - maskRatio))} %`;
  part("reconstruct-time").textContent = `${milliseconds.toFixed(0)} ms on this device`;
  part("reconstruction").hidden = false;
}

async function look(file) {
  const mine = ++turn;
  say("Looking …");
  try {
    const image = await readImage(file);
    const classified = models.classifier && (await models.classifier.classify(image));
    if (mine !== turn) return; // another image has come meanwhile
    if (classified) showClasses(classified, models.classifier.predictsNumbers);
    current = { image, classified };
    await maskAgain();
    say("");
  } catch (error) {
    if (mine === turn) say(error.message, true);
  }
}

async function maskAgain(noise) {
  if (!current || !models.autoencoder) return;
  current.reconstructed = await models.autoencoder.reconstruct(current.image, noise);
  showReconstruction(current.reconstructed, models.autoencoder.patchSize);
}

// -- events

const zone = part("zone");
zone.addEventListener("dragover", (event) => {
  event.preventDefault();
  zone.classList.add("over");
});
zone.addEventListener("dragleave", () => zone.classList.remove("over"));
zone.addEventListener("drop", (event) => {
  event.preventDefault();
  zone.classList.remove("over");
  if (event.dataTransfer.files.length) look(event.dataTransfer.files[0]);
  else say("That was no file. Drop an image from your computer.", true);
});
part("file").addEventListener("change", (event) => {
  if (event.target.files.length) look(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) look(event.clipboardData.files[0]);
});
part("again").addEventListener("click", () => maskAgain());

const loading = [
  ["classifier", Classifier],
  ["autoencoder", Autoencoder],
].map(async ([name, kind]) => {
  models[name] = await kind.load(`./models/${name}`);
});
const outcomes = await Promise.allSettled(loading);
const missing = outcomes.filter((outcome) => outcome.status === "rejected").map((outcome) => outcome.reason.message);
if (missing.length) say(`${missing.join("; ")}. README.md says how to export models for this page.`, true);
else say("");
part("file").disabled = missing.length === outcomes.length;
document.documentElement.dataset.ready = performance.now().toFixed(0); // ms since the page was asked for

// for tests and the console
window.hivit = { models, look, maskAgain, readImage, current: () => current };
