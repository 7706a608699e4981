// What the page knows and shows: nodes, edges, thresholds, what is folded, pinned and picked.
// Python wrote the places, paths, colours and words of the picture; this script chooses among them.
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const stage = find("stage");
const panes = [...document.querySelectorAll(".pane")].map((el, i) => ({
  el, svg: el.querySelector("svg"), map: data.map[i],
}));
const NS = "http://www.w3.org/2000/svg";
function make(tag, attributes, text) {
  const el = document.createElementNS(NS, tag);
  for (const [name, part] of Object.entries(attributes)) el.setAttribute(name, part);
  if (text !== undefined) el.textContent = text;
  return el;
}
const size = (text) => Math.abs(Number(text || 0));

// ---- words; those that all parts share come once ----
const filled = (template, parts) => template.replace(/<(\w+)>/g, (_, name) => parts[name]);
const numbers = (value) => {
  const text = Number(value).toFixed(3);
  return Number(text) ? text.replace("-", "\u2212") : text.replace("-", "");
};
const status = (card) => data.words.status[card.rows[4]];
function rowsOf(info) {
  if (!info.pair) return info.rows.map((text, i) => [data.words.rows[i], i === 4 ? status(info) : text]);
  return info.pair.flatMap((card, i) => (card ? [[`in ${data.names[i]}`, `${card.rows[0]}; ${card.rows[3]}; ${status(card)}`]]
    : [[`in ${data.names[i]}`, "not in this circuit"]]));
}
function edgeWords({ from, to, slot, effect, status = "measured", estimate }, linking) {
  const { words } = data;
  const template = words.edge + (estimate && status !== "estimated" ? words.estimate : "") + (linking ? words.linking : "");
  return filled(template, { sender: from, receiver: to, slot, effect: numbers(effect), status, estimate: numbers(estimate) });
}
function sumWords({ from, to, slot, effect, edges }) {
  return filled(data.words.sums[Number(edges.length > 1)],
    { sender: from.key, receiver: to.key, slot, n: edges.length, effect: numbers(effect) });
}

// a node's name, after the text that is drawn in its place; the word for its role
const named = (key) => (data.words.labels[key] ? `${data.words.labels[key]} (${key})` : key);
const roleWord = (role) => data.words.roles[role] || role;

// ---- one object per node and edge, with its element in each pane ----
const nodes = new Map();
const edges = [];
const supers = new Map();
for (const pane of panes) {
  for (const el of pane.svg.querySelectorAll(".node")) {
    const set = el.dataset, [x, y] = set.at.split(" ").map(Number);
    const kind = set.kind === "group" ? supers : nodes;
    if (!kind.has(set.node)) {
      kind.set(set.node, {
        key: set.node, group: set.group ?? (data.groups.includes(set.role) ? set.role : ""), role: set.role, size: size(set.effect), kind: set.kind,
        bar: ["embed", "logits", "weak"].includes(set.kind), x, y, els: [], shown: true,
      });
    }
    kind.get(set.node).els.push(el);
    titled(el, () => `${named(set.node)}: ${rowsOf(data.nodes[set.node]).map((row) => row.join(" ")).join("; ")}`);
  }
  const known = new Map(edges.map((edge) => [edge.id, edge]));
  for (const el of pane.svg.querySelectorAll(".edge")) {
    const set = el.dataset, id = `${set.from}>${set.to}>${set.slot}`, linking = el.classList.contains("linking");
    const text = titled(el, () => edgeWords(set, linking));
    if (!known.has(id)) {
      const edge = {
        id, from: set.from, to: set.to, slot: set.slot, effect: Number(set.effect || 0), size: size(set.effect),
        status: set.status, linking, els: [], shown: true, text,
      };
      known.set(id, edge);
      edges.push(edge);
    }
    known.get(id).els.push(el);
  }
}
// titles that are more than what the cards say stand in the SVG
function titled(el, text) {
  let title = el.querySelector("title");
  if (!title) { title = make("title", {}, text()); el.prepend(title); }
  return title.textContent;
}

// ---- state ----
const all = [...nodes.values()];
const drawn = all.filter((node) => data.nodes[node.key]);
const largest = (list) => list.reduce((most, item) => Math.max(most, item.size), 0) || 1;
const most = { node: largest(drawn), edge: largest(edges) };
const threshold = { node: 0, edge: data.edgeThreshold };
const folded = new Set();
const pins = [];
const ablating = new Set();
let picked = null, ablation = null;
// a square law gives fine steps near zero, where most effects are
const value = (kind) => { const t = find(kind + "Slider").value / 200; return t * t * most[kind]; };
const firstEdges = Math.sqrt(data.edgeThreshold / most.edge) * 200;

// what stands for a node: itself, or the group that it is folded into
const anchor = (key) => {
  const node = nodes.get(key);
  return node.group && folded.has(node.group) ? supers.get("group:" + node.group) : node;
};

function choose(roles) {
  for (const node of all) {
    node.kept = node.bar || (node.size >= threshold.node && roles.has(node.role));
    node.shown = node.kept && !folded.has(node.group);
  }
  for (const group of supers.values()) group.shown = folded.has(group.group);
  for (const edge of edges) {
    edge.ends = nodes.get(edge.from).kept && nodes.get(edge.to).kept;
    edge.summed = anchor(edge.from).key !== edge.from || anchor(edge.to).key !== edge.to;
    edge.kept = edge.shown = edge.ends && !edge.summed && edge.size >= threshold.edge;
  }
}

// edges of folded groups: summed by pair and slot before weak ones are hidden, the weakest first
let sums = [];
function sumUp() {
  const found = new Map();
  for (const edge of edges.filter((edge) => edge.ends && edge.summed)) {
    const from = anchor(edge.from), to = anchor(edge.to);
    if (from === to) continue;
    const id = [from.key, to.key, edge.slot].join("\0");
    const sum = found.get(id) || { from, to, slot: edge.slot, effect: 0, edges: [], guessed: false, linking: true };
    sum.effect += edge.effect;
    sum.edges.push(edge);
    sum.guessed ||= edge.status === "estimated";
    sum.linking &&= edge.linking;
    found.set(id, sum);
  }
  const scale = Math.max(most.edge, ...[...found.values()].map((sum) => Math.abs(sum.effect)));
  sums = [...found.values()].filter((sum) => Math.abs(sum.effect) >= threshold.edge);
  sums.sort((a, b) => Math.abs(a.effect) - Math.abs(b.effect));
  for (const sum of sums) {
    sum.strength = Math.abs(sum.effect) / scale;
    for (const edge of sum.edges) edge.kept = true;
  }
}

// ---- paths: along what is shown, through folded groups too ----
function reach(origin, from, to) {
  const seen = new Set([origin]), used = new Set(), queue = [origin];
  while (queue.length) {
    const key = queue.pop();
    for (const edge of edges) {
      if (!edge.kept || anchor(edge[from]).key !== key) continue;
      const next = anchor(edge[to]).key;
      used.add(edge);
      if (!seen.has(next)) { seen.add(next); queue.push(next); }
    }
  }
  return { seen, used };
}
// nodes of the model among what was reached; a folded group counts as its members
function reached(keys) {
  return all.filter((node) => node.kept && anchor(node.key) !== picked && keys.has(anchor(node.key).key)).length;
}
