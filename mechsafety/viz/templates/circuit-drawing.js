// The picture: what is shown, folding, paths, zoom, and what keys and controls do.
function update() {
  for (const kind of ["node", "edge"]) find(kind + "Value").textContent = threshold[kind].toFixed(4);
  const roles = new Set([...find("roles").querySelectorAll("input:checked")].map((box) => box.value));
  for (const node of all) {
    node.kept = node.bar || (node.size >= threshold.node && roles.has(node.role));
    node.shown = node.kept && !folded.has(node.group);
    toggle(node, "gone", !node.shown);
  }
  for (const group of supers.values()) {
    group.shown = folded.has(group.group);
    toggle(group, "gone", !group.shown);
  }
  for (const edge of edges) {
    edge.ends = nodes.get(edge.from).kept && nodes.get(edge.to).kept;
    edge.summed = anchor(edge.from).key !== edge.from || anchor(edge.to).key !== edge.to;
    edge.kept = edge.shown = edge.ends && !edge.summed && edge.size >= threshold.edge;
    toggle(edge, "gone", !edge.shown);
  }
  drawSummed();
  const count = (list) => list.filter((item) => item.kept).length;
  find("nodeCount").textContent = `${count(drawn)} of ${drawn.length} nodes shown`;
  find("edgeCount").textContent = `${count(edges)} of ${edges.length} edges shown`;
  // in a comparison the captions speak of each circuit alone
  for (const pane of panes.length === 1 ? panes : []) {
    const text = [...pane.svg.querySelectorAll("text")].find((el) => /edges\sdrawn/.test(el.textContent));
    if (text) {
      const counts = `${count(edges)} of ${edges.length} edges drawn`;
      text.textContent = text.textContent.replace(/\d+\sof\s\d+\sedges\sdrawn( \(the strongest[^)]*\))?/, counts);
    }
  }
  if (picked && !picked.shown) picked = null;
  trace();
}

// edges of folded groups: summed by pair and slot before weak ones are hidden, drawn as in the exports
let sums = [];
function drawSummed() {
  for (const old of document.querySelectorAll(".edge.summed")) old.remove();
  sums = [];
  if (!folded.size) return;
  const found = new Map();
  for (const edge of edges.filter((edge) => edge.ends && edge.summed)) {
    const from = anchor(edge.from), to = anchor(edge.to);
    if (from === to) continue;
    const id = [from.key, to.key, edge.slot].join("\0");
    const sum = found.get(id) || { id, from, to, slot: edge.slot, effect: 0, edges: [], guessed: false };
    sum.effect += edge.effect;
    sum.edges.push(edge);
    sum.guessed ||= edge.status === "estimated";
    found.set(id, sum);
  }
  const scale = Math.max(most.edge, ...[...found.values()].map((sum) => Math.abs(sum.effect)));
  sums = [...found.values()].filter((sum) => Math.abs(sum.effect) >= threshold.edge);
  const paths = detours(sums), dashes = { q: [1, 1.6], k: [4, 2] }, { unit } = data.grid;
  for (const sum of sums.sort((a, b) => Math.abs(a.effect) - Math.abs(b.effect))) {
    for (const edge of sum.edges) edge.kept = true;
    const points = paths.get(sum.id), [x, y] = points[0];
    const width = unit * (0.8 + ((sum.guessed ? 1.6 : 2.4) * Math.abs(sum.effect)) / scale);
    const guessed = sum.guessed, negative = sum.effect < 0, tip = 2.6 * unit + 0.45 * width;
    const colour = guessed ? (negative ? "#C78BAC" : "#8D96A2") : negative ? "#9C2F6B" : "#3F4956";
    const group = make("g", { class: "edge summed", "data-from": sum.from.key, "data-to": sum.to.key });
    const many = sum.edges.length > 1 ? `${sum.edges.length} edges, effects sum to` : "1 edge, effect";
    const words = `${sum.from.key} to ${sum.to.key}, slot ${sum.slot}: ${many} ${numbers(sum.effect)}`;
    group.append(make("title", {}, words));
    const curve = make("path", { d: rounded(points, 5 * unit), fill: "none", stroke: colour, "stroke-width": width });
    if (dashes[sum.slot]) curve.setAttribute("stroke-dasharray", dashes[sum.slot].map((part) => part * Math.max(width, 1.2 * unit)).join(" "));
    const r = 0.95 * tip, k = 0.5523 * r, low = y + 0.8 * tip, s = 0.85 * tip;
    const marks = {
      q: `M${x} ${low - r}C${x + k} ${low - r} ${x + r} ${low - k} ${x + r} ${low}C${x + r} ${low + k} ${x + k} ${low + r} ${x} ${low + r}`
        + `C${x - k} ${low + r} ${x - r} ${low + k} ${x - r} ${low}C${x - r} ${low - k} ${x - k} ${low - r} ${x} ${low - r}Z`,
      k: `M${x - s} ${low - s}L${x + s} ${low - s}L${x + s} ${low + s}L${x - s} ${low + s}Z`,
    };
    const form = marks[sum.slot] || `M${x} ${y}L${x + tip} ${y + 1.7 * tip}L${x - tip} ${y + 1.7 * tip}Z`;
    group.append(curve, make("path", { d: form, fill: guessed ? "#FFFFFF" : colour, stroke: colour, "stroke-width": unit }));
    if (negative) {
      const bar = y + 1.8 * tip + 1.6 * unit;
      group.append(make("path", { d: `M${x - 1.5 * tip} ${bar}L${x + 1.5 * tip} ${bar}`, fill: "none", stroke: colour, "stroke-width": 1.5 * unit }));
    }
    group.addEventListener("pointerenter", () => showText(`${sum.from.key} → ${sum.to.key}`, words));
    group.addEventListener("pointerleave", leave);
    panes[0].svg.querySelector(".edges").append(group);
    sum.el = group;
  }
}

// ways in the channels between nodes alone: the same as mechsafety.viz.groups.detours
function detours(list) {
  const { channels, gaps } = data.grid, ports = { q: -0.3, v: 0.3 };
  // line and column, by the channels that lie below and left
  const cell = (node) => (node.bar ? null : [
    gaps.filter(([low, height]) => low - height / 2 > node.y).length - 1, channels.filter(([left]) => left < node.x).length - 1,
  ]);
  const rails = new Map(), levels = new Map(), ways = new Map();
  const enter = (map, place, into) => {
    if (!map.has(place)) map.set(place, []);
    if (!map.get(place).includes(into)) map.get(place).push(into);
  };
  for (const sum of [...list].sort((a, b) => (a.id < b.id ? -1 : 1))) {
    const sender = cell(sum.from), receiver = cell(sum.to);
    const above = sender ? sender[0] + 1 : null, below = receiver ? receiver[0] : null;
    let into = `${sum.to.key} ${sum.slot}`, rail = null;
    if (above === null || above !== below) {
      if (!receiver) rail = sender ? sender[1] + 1 : 0;
      else rail = sender && sender[1] < receiver[1] ? receiver[1] : receiver[1] + 1;
      into += ` ${rail}`;
      enter(rails, rail, into);
    }
    for (const gap of [above, below]) if (gap !== null) enter(levels, gap, into);
    ways.set(sum.id, { sum, into, rail, above, below });
  }
  const share = (map, place, into) => (map.get(place).indexOf(into) + 1) / (map.get(place).length + 1);
  const paths = new Map();
  for (const [id, { sum, into, rail, above, below }] of ways) {
    const level = (gap) => gaps[gap][0] - gaps[gap][1] * (0.25 + 0.7 * share(levels, gap, into));
    const end = sum.to.x + (ports[sum.slot] || 0) * sum.to.width;
    const foot = sum.to.y + sum.to.height / 2, head = sum.from.y - sum.from.height / 2;
    const x = rail === null ? end : channels[rail][0] + channels[rail][1] * share(rails, rail, into);
    const points = below === null ? [[x, foot]] : [[end, foot], [end, level(below)], [x, level(below)]];
    points.push(...(above === null ? [[x, head]] : [[x, level(above)], [sum.from.x, level(above)], [sum.from.x, head]]));
    paths.set(id, points);
  }
  return paths;
}
function rounded(points, radius) {
  const far = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
  const towards = (a, b, length) => [0, 1].map((i) => a[i] + (length / (far(a, b) || 1)) * (b[i] - a[i]));
  const kept = points.slice(0, 1), parts = [`M${points[0].join(" ")}`];
  for (const point of points.slice(1)) if (far(point, kept[kept.length - 1]) > 0.05) kept.push(point);
  for (let i = 1; i + 1 < kept.length; i++) {
    const [before, corner, after] = kept.slice(i - 1, i + 2);
    const turn = Math.min(radius, far(before, corner) / 2, far(corner, after) / 2);
    const curve = [towards(corner, before, 0.4477 * turn), towards(corner, after, 0.4477 * turn), towards(corner, after, turn)];
    parts.push(`L${towards(corner, before, turn).join(" ")}`, `C${curve.flat().join(" ")}`);
  }
  if (kept.length > 1) parts.push(`L${kept[kept.length - 1].join(" ")}`);
  return parts.join("");
}
function make(tag, attributes, text) {
  const el = document.createElementNS(NS, tag);
  for (const [name, part] of Object.entries(attributes)) el.setAttribute(name, part);
  if (text !== undefined) el.textContent = text;
  return el;
}

function fold(name, on) {
  if (on) folded.add(name); else folded.delete(name);
  const button = document.querySelector(`[data-fold="${CSS.escape(name)}"]`);
  button.setAttribute("aria-pressed", String(on));
  button.textContent = on ? "unfold" : "fold";
  update();
}

function trace() {
  for (const pane of panes) pane.svg.classList.toggle("traced", picked !== null);
  const up = picked && reach(picked.key, "to", "from"), down = picked && reach(picked.key, "from", "to");
  for (const node of [...all, ...supers.values()]) {
    toggle(node, "dim", Boolean(picked) && !up.seen.has(node.key) && !down.seen.has(node.key));
    toggle(node, "picked", node === picked);
  }
  const off = (edge) => Boolean(picked) && !up.used.has(edge) && !down.used.has(edge);
  for (const edge of edges) toggle(edge, "dim", off(edge));
  for (const sum of sums) sum.el.classList.toggle("dim", sum.edges.every(off));
  rest();
  tell();
}
function pick(node) { picked = node; trace(); }

// ---- search ----
function search(text) {
  query = text.trim().toLowerCase();
  const words = (node) => {
    const { promotes = [], suppresses = [], texts = [] } = data.nodes[node.key];
    return [node.key, node.role, node.els[0].el.textContent, ...promotes, ...suppresses, ...texts.flat(2)].join(" ").toLowerCase();
  };
  const hits = query ? drawn.filter((node) => words(node).includes(query)) : [];
  for (const node of all) toggle(node, "hit", hits.includes(node));
  for (const pane of panes) pane.svg.classList.toggle("searching", Boolean(query));
  find("found").textContent = query ? `${hits.length} found` : "";
  return hits;
}

// ---- events on parts ----
for (const node of [...all, ...supers.values()]) {
  for (const { el } of node.els) {
    el.setAttribute("tabindex", "0");
    el.setAttribute("role", "button");
    el.setAttribute("aria-label", el.querySelector("title").textContent);
    el.addEventListener("pointerenter", () => showNode(node));
    el.addEventListener("pointerleave", leave);
    el.addEventListener("focus", () => { if (el.matches(":focus-visible")) showNode(node); });
    el.addEventListener("dblclick", () => { if (node.kind === "group") fold(node.group, false); });
    el.addEventListener("keydown", (event) => nodeKey(event, node));
  }
}
for (const edge of edges) {
  for (const { el } of edge.els) {
    el.addEventListener("pointerenter", () => showText(`${edge.from} → ${edge.to}`, edge.text));
    el.addEventListener("pointerleave", leave);
  }
}

function nodeKey(event, node) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const go = (key) => key && (nodes.get(key) || supers.get(key)).els[0].el.focus();
  const strongest = (end, other) => {
    const some = edges.filter((edge) => edge.kept && anchor(edge[end]) === node && anchor(edge[other]) !== node);
    return some.length && anchor(some.sort((a, b) => b.size - a.size)[0][other]).key;
  };
  const row = all.filter((other) => other.shown && Math.abs(other.y - node.y) < 1).sort((a, b) => a.x - b.x);
  const beside = (step) => (row[row.indexOf(node) + step] || {}).key;
  const actions = {
    Enter: () => pick(node === picked ? null : node),
    " ": () => pick(node === picked ? null : node),
    ArrowUp: () => go(strongest("from", "to")),
    ArrowDown: () => go(strongest("to", "from")),
    ArrowLeft: () => go(beside(-1)),
    ArrowRight: () => go(beside(1)),
    p: () => { if (data.nodes[node.key]) setPin(node, !pins.includes(node)); },
    f: () => { if (node.group) fold(node.group, !folded.has(node.group)); },
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  event.stopPropagation();
  actions[event.key]();
}

// ---- pan and zoom: all panes move together ----
const boxOf = (svg) => svg.viewBox.baseVal;
for (const pane of panes) pane.full = [boxOf(pane.svg).width, boxOf(pane.svg).height];
const { full } = panes[0];
const home = [0, 0, panes[0].map[0], panes[0].map[1]];
let view = [...home];
const apply = () => panes.forEach((pane) => pane.svg.setAttribute("viewBox", view.map((part) => part.toFixed(2)).join(" ")));
function zoom(factor, x, y) {
  const width = Math.min(home[2] * 3, Math.max(home[2] / 14, view[2] * factor)), scale = width / view[2];
  const [cx, cy] = x === undefined ? [view[0] + view[2] / 2, view[1] + view[3] / 2] : [x, y];
  view = [cx - (cx - view[0]) * scale, cy - (cy - view[1]) * scale, width, view[3] * scale];
  apply();
}
function move(dx, dy) { view[0] += dx; view[1] += dy; apply(); }
function centre(node) { view = [node.x - view[2] / 2, node.y - view[3] / 2, view[2], view[3]]; apply(); }
const paneOf = (event) => panes.find((pane) => pane.el.contains(event.target)) || panes[0];
function point(event) {
  const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(paneOf(event).svg.getScreenCTM().inverse());
  return [place.x, place.y];
}
// the whole map, at the top; a tall one begins larger, with labels of at least nine pixels
function first() {
  const box = panes.find((pane) => !pane.el.hidden).svg.getBoundingClientRect();
  view = [...home];
  if (box.width && box.height) {
    const wide = home[2] / box.width, scale = Math.max(wide, Math.min(home[3] / box.height, 4 / 3));
    view = [(home[2] - box.width * scale) / 2, 0, box.width * scale, box.height * scale];
  }
  apply();
}

// inside another page the wheel scrolls that page until the picture has been clicked
const framed = window.self !== window.top;
const active = () => !framed || stage.contains(document.activeElement);
find("hint").textContent = framed ? "click the picture, then wheel to zoom, drag to move" : "wheel to zoom, drag to move, ? for keys";
stage.addEventListener("wheel", (event) => {
  if (!active() && !event.ctrlKey) return;
  event.preventDefault();
  zoom(event.deltaY > 0 ? 1.12 : 1 / 1.12, ...point(event));
}, { passive: false });
let drag = null;
stage.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || event.target.closest("button")) return;
  drag = { x: event.clientX, y: event.clientY, moved: false, scale: 1 / paneOf(event).svg.getScreenCTM().a };
});
window.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  if (!drag.moved && Math.hypot(dx, dy) < 4) return;
  move(-dx * drag.scale, -dy * drag.scale);
  drag = { ...drag, x: event.clientX, y: event.clientY, moved: true };
});
window.addEventListener("pointerup", () => { if (drag) setTimeout(() => { drag = null; }, 0); });
stage.addEventListener("click", (event) => {
  if (event.target.closest("button") || (drag && drag.moved)) return;
  const hit = event.target.closest(".node");
  if (!hit) stage.focus({ preventScroll: true });
  const node = hit ? nodes.get(hit.dataset.node) || supers.get(hit.dataset.node) : null;
  pick(node === picked ? null : node);
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=search], textarea, select");
  if (event.key === "Escape") { find("search").value = ""; search(""); pick(null); stage.focus(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = view[2] / 12;
  const actions = {
    "/": () => find("search").focus(), "?": help, d: switchTheme, 0: first,
    "+": () => zoom(1 / 1.2), "=": () => zoom(1 / 1.2), "-": () => zoom(1.2),
    ...(stage.contains(document.activeElement) && {
      ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step), ArrowDown: () => move(0, step),
    }),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});

// ---- theme ----
const root = document.documentElement;
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
const setDark = (on) => root.classList.toggle("dark", on);
setDark(root.dataset.theme === "dark" || (root.dataset.theme === "auto" && systemDark.matches));
if (root.dataset.theme === "auto") systemDark.addEventListener("change", () => setDark(systemDark.matches));
function switchTheme() { setDark(!root.classList.contains("dark")); }

// ---- views of a comparison ----
function setView(both) {
  panes.forEach((pane, i) => { pane.el.hidden = panes.length > 1 && (both ? i === 0 : i > 0); });
  if (find("key")) find("key").hidden = !both;
  first();
}
for (const box of document.querySelectorAll("#views input")) box.addEventListener("change", () => setView(box.value === "1"));

// ---- controls ----
let found = 0;
find("search").addEventListener("input", (event) => { found = 0; search(event.target.value); });
find("search").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  const hits = search(event.target.value).filter((node) => node.shown);
  if (hits.length) { const node = hits[found++ % hits.length]; centre(node); pick(node); }
});
find("in").addEventListener("click", () => zoom(1 / 1.3));
find("out").addEventListener("click", () => zoom(1.3));
find("fit").addEventListener("click", () => { view = [0, 0, ...full]; apply(); });
find("saveSvg").addEventListener("click", saveSvg);
find("copyTikz").addEventListener("click", copyTikz);
find("theme").addEventListener("click", switchTheme);
find("keys").addEventListener("click", help);
find("reset").addEventListener("click", reset);
for (const kind of ["node", "edge"]) {
  find(kind + "Slider").addEventListener("input", () => { threshold[kind] = value(kind); update(); });
}
find("roles").addEventListener("change", update);
for (const button of document.querySelectorAll("[data-fold]")) {
  button.addEventListener("click", () => fold(button.dataset.fold, !folded.has(button.dataset.fold)));
}
function reset() {
  for (const box of find("roles").querySelectorAll("input")) box.checked = true;
  for (const name of [...folded]) fold(name, false);
  while (pins.length) setPin(pins[0], false);
  find("nodeSlider").value = 0;
  find("edgeSlider").value = firstEdges;
  threshold.node = 0;
  threshold.edge = data.edgeThreshold;
  find("search").value = "";
  search("");
  find("ablationSelect").value = "";
  setAblation(null);
  picked = null;
  first();
  update();
}

function start() {
  setView(false);
  reset();
  for (const name of data.fold) if (document.querySelector(`[data-fold="${CSS.escape(name)}"]`)) fold(name, true);
}
