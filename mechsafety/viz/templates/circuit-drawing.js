// The picture: what is shown, folding, paths, zoom, and what keys and controls do.
const toggle = (item, name, on) => item.els.forEach((el) => el.classList.toggle(name, on));

// ---- what is shown ----
function update() {
  for (const kind of ["node", "edge"]) find(kind + "Value").textContent = threshold[kind].toFixed(4);
  choose(new Set([...find("roles").querySelectorAll("input:checked")].map((box) => box.value)));
  sumUp();
  for (const item of [...all, ...supers.values(), ...edges]) toggle(item, "gone", !item.shown);
  drawSums();
  const count = (list) => list.filter((item) => item.kept).length;
  find("nodeCount").textContent = `${count(drawn)} of ${drawn.length} nodes shown`;
  find("edgeCount").textContent = `${count(edges)} of ${edges.length} edges shown`;
  if (data.caption) {
    const line = panes[0].svg.querySelectorAll(".backdrop text")[data.caption.place];
    line.textContent = data.caption.text.join(count(edges));
    line.dataset.tex = data.caption.tex.join(count(edges));
  }
  if (picked && !picked.shown) picked = null;
  trace();
}

function drawSums() {
  for (const old of document.querySelectorAll(".edge.summed")) old.remove();
  for (const sum of sums) {
    const words = sumWords(sum);
    sum.el = make("g", { class: "edge summed", "data-from": sum.from.key, "data-to": sum.to.key });
    sum.el.append(make("title", {}, words), ...sumMarks(sum));
    sum.el.addEventListener("pointerenter", () => showText(`${sum.from.key} → ${sum.to.key}`, words));
    sum.el.addEventListener("pointerleave", leave);
    panes[0].svg.querySelector(".edges").append(sum.el);
  }
}

// the path is Python's; how wide a sum is depends on the thresholds, so that its marks are stretched here
function sumMarks({ from, to, slot, effect, strength, guessed, linking }) {
  const look = data.sums, ways = look.paths[to.key][slot];
  const path = ((ways[""] || "") + ways[from.key]).replace(/~(\d+)/g, (_, turn) => look.turns[turn]);
  const [x, y] = path.match(/-?[\d.]+/g).map(Number);
  const [thin, wide] = look.widths[guessed ? "estimated" : "measured"], width = thin + strength * (wide - thin);
  const stroke = look.colours[linking ? "linking" : guessed ? "estimated" : "measured"][Number(effect < 0)];
  const dashes = look.dashes[linking ? "linking" : slot].map((part) => part * Math.max(width, look.thinnestDashed));
  const mark = ([none, one]) => none.map(([letter, ...at], i) => letter
    + at.map((n, k) => (n + width * (one[i][k + 1] - n) + (k % 2 ? y : x)).toFixed(1)).join(" ")).join("");
  const marks = [
    make("path", { d: path, fill: "none", stroke, "stroke-width": Number(width.toPrecision(3)) }),
    make("path", { d: mark(look.tips[slot]), fill: guessed ? look.paper : stroke, stroke, "stroke-width": look.rims[0] }),
  ];
  if (dashes.length) marks[0].setAttribute("stroke-dasharray", dashes.map((part) => Number(part.toFixed(2))).join(" "));
  if (effect < 0) marks.push(make("path", { d: mark(look.bar), fill: "none", stroke, "stroke-width": look.rims[1] }));
  return marks;
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
  const query = text.trim().toLowerCase();
  const words = (node) => {
    const { promotes = [], suppresses = [], texts = [] } = data.nodes[node.key];
    return [node.key, node.role, roleWord(node.role), node.els[0].textContent, ...promotes, ...suppresses, ...texts.flat(2)].join(" ").toLowerCase();
  };
  const hits = query ? drawn.filter((node) => words(node).includes(query)) : [];
  for (const node of all) toggle(node, "hit", hits.includes(node));
  for (const pane of panes) pane.svg.classList.toggle("searching", Boolean(query));
  find("found").textContent = query ? `${hits.length} found` : "";
  return hits;
}

// ---- events on parts ----
let visited = null;
// the part that the keyboard comes to first: the last one, otherwise the one of the largest effect
function enter() {
  const shown = [...all, ...supers.values()].filter((node) => node.shown).sort((a, b) => Number(a.bar) - Number(b.bar) || b.size - a.size);
  const node = shown.includes(visited) ? visited : shown[0];
  if (node) node.els.find((el) => el.checkVisibility()).focus();
}
for (const node of [...all, ...supers.values()]) {
  for (const el of node.els) {
    // the picture is one stop of the Tab key; arrows go on inside
    el.setAttribute("tabindex", "-1");
    el.setAttribute("role", "button");
    el.setAttribute("aria-label", el.querySelector("title").textContent);
    el.addEventListener("pointerenter", () => showNode(node));
    el.addEventListener("pointerleave", leave);
    el.addEventListener("focus", () => {
      visited = node;
      if (!el.matches(":focus-visible")) return;
      showNode(node);
      if (Math.abs(node.x - view[0] - view[2] / 2) > 0.48 * view[2] || Math.abs(node.y - view[1] - view[3] / 2) > 0.48 * view[3]) centre(node);
    });
    el.addEventListener("dblclick", () => { if (node.kind === "group") fold(node.group, false); });
    el.addEventListener("keydown", (event) => nodeKey(event, node));
  }
}
for (const edge of edges) {
  for (const el of edge.els) {
    el.addEventListener("pointerenter", () => showText(`${edge.from} → ${edge.to}`, edge.text));
    el.addEventListener("pointerleave", leave);
  }
}

function nodeKey(event, node) {
  if (event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key.startsWith("Arrow"))) return;
  const go = (key) => key && (nodes.get(key) || supers.get(key)).els[0].focus();
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
// whether the reader has chosen the view; until then it follows the window
let chosen = false;
const apply = () => {
  chosen = true;
  panes.forEach((pane) => pane.svg.setAttribute("viewBox", view.map((part) => part.toFixed(2)).join(" ")));
};
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
// the whole map; one whose labels would be too small to read begins larger, at its top
function first() {
  const box = panes.find((pane) => !pane.el.hidden).svg.getBoundingClientRect();
  view = [...home];
  if (box.width && box.height) {
    const scale = Math.min(data.readable, Math.max(home[2] / box.width, home[3] / box.height));
    const [width, height] = [box.width * scale, box.height * scale], spare = home[2] - width;
    // of a map that is too wide, the parts at the top are shown
    const top = all.filter((node) => !node.bar && node.y < height), sum = top.reduce((total, node) => total + node.x, 0);
    view = [spare < 0 || !top.length ? spare / 2 : Math.min(spare, Math.max(0, sum / top.length - width / 2)), 0, width, height];
  }
  apply();
  chosen = false;
}
// a frame may get its size only after its page has run
new ResizeObserver(() => { if (!chosen) first(); }).observe(stage);

// inside another page the wheel scrolls that page until the picture has been clicked
const framed = window.self !== window.top;
const active = () => !framed || stage.contains(document.activeElement);
const touch = window.matchMedia("(pointer: coarse)").matches;
find("hint").textContent = (touch ? "tap the picture, then pinch to zoom, drag to move; ⤢ for all"
  : framed ? "click the picture, then wheel to zoom, drag to move" : "wheel to zoom, drag to move, ? for keys");
stage.addEventListener("wheel", (event) => {
  if (!active() && !event.ctrlKey) return;
  event.preventDefault();
  zoom(event.deltaY > 0 ? 1.12 : 1 / 1.12, ...point(event));
}, { passive: false });
let drag = null;
// two fingers: the distance between them zooms about their middle
const fingers = new Map();
const spread = () => {
  const [a, b] = [...fingers.values()];
  return { apart: Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1,
    middle: { clientX: (a.clientX + b.clientX) / 2, clientY: (a.clientY + b.clientY) / 2, target: a.target } };
};
function pinch(event) {
  const before = spread();
  fingers.set(event.pointerId, event);
  const after = spread(), [x, y] = point(before.middle);
  zoom(before.apart / after.apart, x, y);
  const [x1, y1] = point(after.middle);
  move(x - x1, y - y1);
  if (drag) drag.moved = true;
}
const lift = (event) => { fingers.delete(event.pointerId); if (drag) setTimeout(() => { drag = null; }, 0); };
stage.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || event.target.closest("button")) return;
  if (event.pointerType === "touch") fingers.set(event.pointerId, event);
  drag = { x: event.clientX, y: event.clientY, moved: false, scale: 1 / paneOf(event).svg.getScreenCTM().a };
});
window.addEventListener("pointermove", (event) => {
  if (fingers.size === 2 && fingers.has(event.pointerId)) { pinch(event); return; }
  if (!drag) return;
  const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  if (!drag.moved && Math.hypot(dx, dy) < 4) return;
  move(-dx * drag.scale, -dy * drag.scale);
  drag = { ...drag, x: event.clientX, y: event.clientY, moved: true };
});
window.addEventListener("pointerup", lift);
window.addEventListener("pointercancel", lift);
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
    ...(stage.contains(document.activeElement) && (event.shiftKey ? {
      ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step), ArrowDown: () => move(0, step),
    } : { ArrowLeft: enter, ArrowRight: enter, ArrowUp: enter, ArrowDown: enter, Enter: enter })),
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
