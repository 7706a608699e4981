// The model: a Llama in double precision. Weights and names are those of the page's data.
const data = JSON.parse(document.getElementById("data").textContent);
const weights = readWeights();
const width = data.shapes.norm[0];
const headWidth = data.shapes["0.q"][1];
const names = [];
for (let layer = 0; layer < data.layers; layer++) {
  for (let head = 0; head < data.heads; head++) names.push(`L${layer}.H${head}`);
  names.push(`L${layer}.MLP`);
}

function readWeights() {
  const bytes = Uint8Array.from(atob(data.weights), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const found = {};
  let place = 0;
  for (const [name, shape] of Object.entries(data.shapes)) {
    const size = shape.reduce((a, b) => a * b, 1);
    found[name] = Float64Array.from({ length: size }, (_, k) => view.getFloat32(4 * (place + k), true));
    place += size;
  }
  return found;
}

// x [pos d] times the rows [row d] of a weight, from its row `first` on: [pos row]
function project(x, weight, rows, first = 0) {
  const positions = x.length / width;
  const out = new Float64Array(positions * rows);
  for (let pos = 0; pos < positions; pos++) {
    for (let row = 0; row < rows; row++) {
      let sum = 0;
      for (let k = 0; k < width; k++) sum += x[pos * width + k] * weight[(first + row) * width + k];
      out[pos * rows + row] = sum;
    }
  }
  return out;
}

// x [pos row] times a weight [row d], from its row `first` on: [pos d]
function write(x, weight, rows, first = 0) {
  const positions = x.length / rows;
  const out = new Float64Array(positions * width);
  for (let pos = 0; pos < positions; pos++) {
    for (let row = 0; row < rows; row++) {
      const value = x[pos * rows + row];
      for (let k = 0; k < width; k++) out[pos * width + k] += value * weight[(first + row) * width + k];
    }
  }
  return out;
}

// RMSNorm
function norm(x, weight) {
  const out = new Float64Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    let squares = 0;
    for (let k = 0; k < width; k++) squares += x[start + k] ** 2;
    const scale = 1 / Math.sqrt(squares / width + data.eps);
    for (let k = 0; k < width; k++) out[start + k] = x[start + k] * scale * weight[k];
  }
  return out;
}

// rotary positions: dimension k turns together with dimension k + d_head / 2; angles in single precision, as in training
function rotate(x) {
  const half = headWidth / 2;
  for (let pos = 0; pos < x.length / headWidth; pos++) {
    for (let k = 0; k < half; k++) {
      const angle = Math.fround(pos * weights.frequencies[k]);
      const cos = Math.fround(Math.cos(angle));
      const sin = Math.fround(Math.sin(angle));
      const a = pos * headWidth + k;
      [x[a], x[a + half]] = [x[a] * cos - x[a + half] * sin, x[a + half] * cos + x[a] * sin];
    }
  }
  return x;
}

// causal attention of one head: z [pos d_head]
function attend(q, k, v) {
  const positions = q.length / headWidth;
  const z = new Float64Array(q.length);
  for (let at = 0; at < positions; at++) {
    const scores = [];
    for (let from = 0; from <= at; from++) {
      let sum = 0;
      for (let d = 0; d < headWidth; d++) sum += q[at * headWidth + d] * k[from * headWidth + d];
      scores.push(sum / Math.sqrt(headWidth));
    }
    const largest = Math.max(...scores);
    const shares = scores.map((score) => Math.exp(score - largest));
    const total = shares.reduce((a, b) => a + b, 0);
    shares.forEach((share, from) => {
      for (let d = 0; d < headWidth; d++) z[at * headWidth + d] += (share / total) * v[from * headWidth + d];
    });
  }
  return z;
}

/* One run. `edits` maps a part's name to the value it takes: z [pos d_head] of a head, the output [pos d_model] of an MLP.
   `wire` = {from, to, slot, run}: the receiver reads, through this slot, what the sender wrote in another run. */
function forward(ids, edits = new Map(), wire = null) {
  const stream = new Float64Array(ids.length * width);
  const outputs = new Map(); // what embedding, heads and MLPs add to the residual stream, [pos d_model]
  const values = new Map(); // what an edit replaces
  const add = (name, output) => {
    outputs.set(name, output);
    for (let k = 0; k < output.length; k++) stream[k] += output[k];
  };
  const read = (name, slot) => {
    if (wire === null || wire.to !== name || wire.slot !== slot) return stream;
    const own = outputs.get(wire.from);
    const other = wire.run.outputs.get(wire.from);
    return stream.map((value, k) => value + other[k] - own[k]);
  };
  const embedded = new Float64Array(stream.length);
  ids.forEach((id, pos) => embedded.set(weights.embed.subarray(id * width, (id + 1) * width), pos * width));
  add("embed", embedded);
  for (let layer = 0; layer < data.layers; layer++) {
    const of = (name) => weights[`${layer}.${name}`];
    const made = [];
    for (let head = 0; head < data.heads; head++) {
      const name = `L${layer}.H${head}`;
      const group = Math.floor((head * data.kvHeads) / data.heads);
      const slot = (kind, index) =>
        project(norm(read(name, kind), of("norm1")), of(kind), headWidth, index * headWidth);
      const z =
        edits.get(name) ?? attend(rotate(slot("q", head)), rotate(slot("k", group)), slot("v", group));
      values.set(name, z);
      made.push([name, write(z, of("o"), headWidth, head * headWidth)]);
    }
    for (const [name, output] of made) add(name, output); // the heads of a layer run side by side
    const name = `L${layer}.MLP`;
    const neurons = data.shapes[`${layer}.gate`][0];
    const x = norm(read(name, "mlp"), of("norm2"));
    const up = project(x, of("up"), neurons);
    const active = project(x, of("gate"), neurons).map((value, k) => (value / (1 + Math.exp(-value))) * up[k]);
    const output = edits.get(name) ?? write(active, of("down"), neurons);
    values.set(name, output);
    add(name, output);
  }
  const last = norm(read("logits", "resid").slice(-width), weights.norm);
  const logits = [...project(last, weights.unembed, data.words.length)];
  return { outputs, values, logits, score: logOdds(logits) };
}

function logSumExp(values) {
  const largest = Math.max(...values);
  return largest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - largest), 0));
}

// log P(refusal words) - log P(all other words)
function logOdds(logits) {
  const refuses = (_, id) => data.refusal.includes(id);
  return logSumExp(logits.filter(refuses)) - logSumExp(logits.filter((logit, id) => !refuses(logit, id)));
}

// the reply's most likely first word, and its probability
function firstWord(logits) {
  const id = logits.indexOf(Math.max(...logits));
  return [data.words[id], Math.exp(logits[id] - logSumExp(logits))];
}
