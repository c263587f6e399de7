// Preprocessing: from an image to the pixel values that Python computes, bit for bit.
//
// A canvas scales in its own way, which differs from browser to browser and from Pillow, so images are resized here:
// a weighted mean over the support of the filter, with the rounding of 8-bit images after each of the two directions.

const FILTERS = {
  2: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) }, // bilinear
  3: { support: 2, weight: cubic }, // bicubic
};

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((x - 5) * x + 8) * x * a - 4 * a;
  return 0;
}

// For each place of the result: the first place of the source that counts, and the weights from there on, in 1 / 2^22.
function weights(from, to, { support, weight }) {
  const scale = from / to;
  const stretch = Math.max(scale, 1); // a wider filter when the image shrinks
  return Array.from({ length: to }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const last = Math.min(from, Math.trunc(center + support * stretch + 0.5));
    const raw = Array.from({ length: last - first }, (_, i) => weight((i + first - center + 0.5) / stretch));
    const sum = raw.reduce((a, b) => a + b, 0);
    const whole = raw.map((w) => Math.trunc((w / sum) * 2 ** 22 + (w < 0 ? -0.5 : 0.5)));
    return { first, whole };
  });
}

// One direction. `step` is the distance of neighbors along it, `lines` the offsets of the lines to resize.
function resizeLines(source, target, table, lines, step, targetLines, targetStep) {
  for (let line = 0; line < lines.length; line++) {
    for (let place = 0; place < table.length; place++) {
      const { first, whole } = table[place];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** 21;
        for (let i = 0; i < whole.length; i++) {
          sum += source[lines[line] + (first + i) * step + channel] * whole[i];
        }
        target[targetLines[line] + place * targetStep + channel] = Math.floor(sum / 2 ** 22); // the array clamps
      }
    }
  }
}

const offsets = (count, step) => Array.from({ length: count }, (_, i) => i * step);

// `image` is {width, height, data}, three bytes per pixel.
export function resize(image, width, height, resample) {
  const filter = FILTERS[resample];
  if (!filter) throw new Error(`This page resizes bilinearly (2) and bicubically (3), not with filter ${resample}.`);
  let current = image;
  if (width !== current.width) {
    const data = new Uint8ClampedArray(width * current.height * 3);
    const rows = [offsets(current.height, current.width * 3), offsets(current.height, width * 3)];
    resizeLines(current.data, data, weights(current.width, width, filter), rows[0], 3, rows[1], 3);
    current = { width, height: current.height, data };
  }
  if (height !== current.height) {
    const data = new Uint8ClampedArray(width * height * 3);
    const columns = offsets(width, 3);
    resizeLines(current.data, data, weights(current.height, height, filter), columns, width * 3, columns, width * 3);
    current = { width, height, data };
  }
  return current;
}

function crop(image, width, height) {
  const left = Math.floor((image.width - width) / 2);
  const top = Math.floor((image.height - height) / 2);
  if (left < 0 || top < 0) throw new Error(`The processor cuts ${width}x${height} px out of a smaller image.`);
  const data = new Uint8ClampedArray(width * height * 3);
  for (let row = 0; row < height; row++) {
    const start = ((top + row) * image.width + left) * 3;
    data.set(image.data.subarray(start, start + width * 3), row * width * 3);
  }
  return { width, height, data };
}

function target(image, size) {
  if (size.height) return [size.width, size.height];
  const [short, long] = [Math.min(image.width, image.height), Math.max(image.width, image.height)];
  const longer = Math.trunc((size.shortest_edge * long) / short);
  return image.width <= image.height ? [size.shortest_edge, longer] : [longer, size.shortest_edge];
}

// Processors that resize, cut out the middle and normalize, in this order.
const KNOWN = ["BitImageProcessor", "ViTImageProcessor", "CLIPImageProcessor"];

export function checkProcessor({ image_processor_type: name = KNOWN[0], do_rescale, do_normalize }) {
  if (!KNOWN.includes(name.replace(/Fast$/, ""))) {
    throw new Error(`This page prepares images as ${KNOWN.join(", ")} do, not as ${name} does`);
  }
  if (do_rescale === false || do_normalize === false) {
    throw new Error("This page rescales and normalizes images, and the model's processor does not");
  }
}

// What the model sees, still as bytes. `processor` is the content of preprocessor_config.json.
export function seenBy(processor, image) {
  if (processor.do_resize !== false) {
    image = resize(image, ...target(image, processor.size), processor.resample ?? 3);
  }
  if (processor.do_center_crop !== false && processor.crop_size) {
    image = crop(image, processor.crop_size.width, processor.crop_size.height);
  }
  return image;
}

// (3, height, width), normalized.
export function toPixelValues(processor, { width, height, data }) {
  const values = new Float32Array(3 * width * height);
  for (let channel = 0; channel < 3; channel++) {
    const [mean, std] = [processor.image_mean[channel], processor.image_std[channel]];
    for (let i = 0; i < width * height; i++) {
      values[channel * width * height + i] = (data[3 * i + channel] * processor.rescale_factor - mean) / std;
    }
  }
  return values;
}

// Denormalization: bytes of an image from pixel values.
export function toImage(processor, values, width, height) {
  const data = new Uint8ClampedArray(3 * width * height);
  for (let channel = 0; channel < 3; channel++) {
    const [mean, std] = [processor.image_mean[channel], processor.image_std[channel]];
    for (let i = 0; i < width * height; i++) {
      data[3 * i + channel] = Math.round((values[channel * width * height + i] * std + mean) / processor.rescale_factor);
    }
  }
  return { width, height, data };
}
