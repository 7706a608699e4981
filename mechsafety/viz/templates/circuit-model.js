// What the page knows and shows: nodes, edges, thresholds, what is folded, pinned and picked.
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const stage = find("stage");
const panes = [...document.querySelectorAll(".pane")].map((el, i) => ({
  el, svg: el.querySelector("svg"), name: el.dataset.pane, map: data.map[i],
}));
const NS = "http://www.w3.org/2000/svg";
const size = (text) => Math.abs(Number(text || 0));
// what the cards and tooltips say; words that all share come once
const numbers = (value) => {
  const text = Number(value).toFixed(3);
  return Number(text) ? text.replace("-", "\u2212") : text.replace("-", "");
};
const status = (card) => data.words.status[card.rows[4]];
function rowsOf(info) {
  if (!info.pair) return info.rows.map((text, i) => [data.words.rows[i], i === 4 ? status(info) : text]);
  return info.pair.flatMap((card, i) => (card ? [[`in ${data.names[i]}`, `${card.rows[0]}; ${card.rows[3]}; ${status(card)}`]]
    : [[`in ${data.names[i]}`, "not in it"]]));
}
function titled(el, text) {
  let title = el.querySelector("title");
  if (!title) { title = make("title", {}, text()); el.prepend(title); }
  return title.textContent;
}

// ---- model: one object a node and edge, with its element in each pane ----
const nodes = new Map();
const edges = [];
const supers = new Map();
panes.forEach((pane, place) => {
  for (const el of pane.svg.querySelectorAll(".node")) {
    const set = el.dataset, [x, y, width, height] = set.box.split(" ").map(Number);
    const kind = set.kind === "group" ? supers : nodes;
    if (!kind.has(set.node)) {
      kind.set(set.node, {
        key: set.node, group: set.group || "", role: set.role, size: size(set.effect), kind: set.kind,
        bar: set.kind === "embed" || set.kind === "logits", x, y, width, height, els: [], shown: true,
      });
    }
    kind.get(set.node).els.push({ el, place });
    titled(el, () => `${set.node}: ${rowsOf(data.nodes[set.node]).map((row) => row.join(" ")).join("; ")}`);
  }
  const known = new Map(edges.map((edge) => [edge.id, edge]));
  for (const el of pane.svg.querySelectorAll(".edge")) {
    const set = el.dataset, id = `${set.from}>${set.to}>${set.slot}`;
    if (!known.has(id)) {
      const edge = {
        id, from: set.from, to: set.to, slot: set.slot, effect: Number(set.effect || 0), size: size(set.effect),
        status: set.status, els: [], shown: true,
        text: titled(el, () => `${set.from} \u2192 ${set.to}, slot ${set.slot}: effect ${numbers(set.effect)}, ${set.status}`
          + (set.estimate && set.status !== "estimated" ? ` (gradient estimate ${numbers(set.estimate)})` : "")),
      };
      known.set(id, edge);
      edges.push(edge);
    }
    known.get(id).els.push({ el, place });
  }
});
const all = [...nodes.values()];
const drawn = all.filter((node) => data.nodes[node.key]);
const largest = (list) => list.reduce((most, item) => Math.max(most, item.size), 0) || 1;
const most = { node: largest(drawn), edge: largest(edges) };
const threshold = { node: 0, edge: data.edgeThreshold };
const folded = new Set();
const pins = [];
const ablating = new Set();
let picked = null, query = "", ablation = null;

// ---- what is shown ----
// a square law gives fine steps near zero, where most effects are
const value = (kind) => { const t = find(kind + "Slider").value / 200; return t * t * most[kind]; };
const firstEdges = Math.sqrt(data.edgeThreshold / most.edge) * 200;
const toggle = (item, name, on) => item.els.forEach(({ el }) => el.classList.toggle(name, on));
const anchor = (key) => {
  const node = nodes.get(key);
  return node.group && folded.has(node.group) ? supers.get("group:" + node.group) : node;
};

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
