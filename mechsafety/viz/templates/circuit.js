"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const stage = document.getElementById("stage");
  const svg = stage.querySelector("svg");
  const find = (id) => document.getElementById(id);
  const nodes = [...svg.querySelectorAll(".node")].map((el) => ({
    el, key: el.dataset.node, role: el.dataset.role, size: Math.abs(Number(el.dataset.effect || 0)),
    implied: el.dataset.implied === "true",
  }));
  const byKey = new Map(nodes.map((node) => [node.key, node]));
  const edges = [...svg.querySelectorAll(".edge")].map((el, i) => ({
    el, from: el.dataset.from, to: el.dataset.to, size: Math.abs(Number(el.dataset.effect || 0)), text: data.edges[i],
  }));
  const drawn = nodes.filter((node) => !node.implied);
  const largest = (list) => list.reduce((most, item) => Math.max(most, item.size), 0) || 1;
  const most = { node: largest(drawn), edge: largest(edges) };
  const threshold = { node: 0, edge: 0 };
  // The caption's count follows the threshold, also in a downloaded picture.
  const caption = [...svg.querySelectorAll("text")].find((el) => /edges\sdrawn/.test(el.textContent));
  let picked = null;

  // A square law gives fine steps near zero, where most effects are.
  const value = (kind) => { const t = find(kind + "Slider").value / 200; return t * t * most[kind]; };
  const start = Math.sqrt(data.edgeThreshold / most.edge) * 200;

  function update() {
    for (const kind of ["node", "edge"]) find(kind + "Value").textContent = threshold[kind].toFixed(4);
    const roles = new Set([...document.querySelectorAll("#roles input:checked")].map((box) => box.value));
    for (const node of nodes) {
      node.shown = node.implied || (node.size >= threshold.node && roles.has(node.role));
      node.el.classList.toggle("gone", !node.shown);
    }
    for (const edge of edges) {
      edge.shown = edge.size >= threshold.edge && byKey.get(edge.from).shown && byKey.get(edge.to).shown;
      edge.el.classList.toggle("gone", !edge.shown);
    }
    const count = (list) => list.filter((item) => item.shown).length;
    find("nodeCount").textContent = `${count(drawn)} of ${drawn.length} nodes shown`;
    find("edgeCount").textContent = `${count(edges)} of ${edges.length} edges shown`;
    if (caption) {
      const counts = `${count(edges)} of ${edges.length} edges drawn`;
      caption.textContent = caption.textContent.replace(/\d+\sof\s\d+\sedges\sdrawn( \(the strongest\))?/, counts);
    }
    if (picked && !picked.shown) picked = null;
    trace();
  }

  function reach(origin, from, to) {
    const seen = new Set([origin]), used = new Set(), queue = [origin];
    while (queue.length) {
      const key = queue.pop();
      for (const edge of edges) {
        if (!edge.shown || edge[from] !== key) continue;
        used.add(edge);
        if (!seen.has(edge[to])) { seen.add(edge[to]); queue.push(edge[to]); }
      }
    }
    return { seen, used };
  }

  function trace() {
    svg.classList.toggle("traced", picked !== null);
    const up = picked && reach(picked.key, "to", "from"), down = picked && reach(picked.key, "from", "to");
    for (const node of nodes) {
      const on = !picked || up.seen.has(node.key) || down.seen.has(node.key);
      node.el.classList.toggle("dim", !on);
      node.el.classList.toggle("picked", node === picked);
    }
    for (const edge of edges) {
      const on = Boolean(picked) && (up.used.has(edge) || down.used.has(edge));
      edge.el.classList.toggle("dim", Boolean(picked) && !on);
      edge.el.classList.toggle("on", on);
    }
    if (picked) showNode(picked, `${up.seen.size - 1} nodes upstream, ${down.seen.size - 1} downstream`);
  }

  function add(parent, tag, text) {
    const el = document.createElement(tag);
    el.textContent = text;
    parent.append(el);
    return el;
  }

  function rest() {
    const panel = find("panel");
    panel.replaceChildren();
    add(panel, "h2", "Refusal circuit");
    add(panel, "p", "Point at a node or an edge for its numbers. Click a node to see every path into and out of it; "
      + "click empty space to clear.");
  }

  function showNode(node, note) {
    const panel = find("panel"), info = data.nodes[node.key];
    panel.replaceChildren();
    add(panel, "h2", info ? info.name : node.key);
    if (note) add(panel, "p", note);
    if (!info) { add(panel, "p", "Drawn for orientation; not a node of the circuit."); return; }
    const list = add(panel, "dl", "");
    for (const [name, text] of info.rows) { add(list, "dt", name); add(list, "dd", text); }
    add(panel, "p", "What the role rests on:");
    const facts = add(panel, "ul", "");
    for (const text of info.evidence) add(facts, "li", text);
  }

  function showEdge(edge) {
    const panel = find("panel");
    panel.replaceChildren();
    add(panel, "h2", `${edge.from} → ${edge.to}`);
    add(panel, "p", edge.text);
  }

  const settle = () => (picked ? trace() : rest());
  function pick(node) { picked = node; settle(); if (!node) trace(); }

  for (const node of nodes) {
    node.el.setAttribute("tabindex", "0");
    node.el.setAttribute("role", "button");
    node.el.setAttribute("aria-label", node.el.querySelector("title").textContent);
    node.el.addEventListener("pointerenter", () => showNode(node));
    node.el.addEventListener("pointerleave", settle);
    node.el.addEventListener("focus", () => { if (node.el.matches(":focus-visible")) showNode(node); });
    node.el.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(node === picked ? null : node); }
    });
  }
  for (const edge of edges) {
    edge.el.addEventListener("pointerenter", () => showEdge(edge));
    edge.el.addEventListener("pointerleave", settle);
  }

  const full = svg.viewBox.baseVal;
  const home = [full.x, full.y, full.width, full.height];
  let view = [...home];
  const apply = () => svg.setAttribute("viewBox", view.map((part) => part.toFixed(2)).join(" "));
  function zoom(factor, x, y) {
    const width = Math.min(home[2] * 2, Math.max(home[2] / 12, view[2] * factor)), scale = width / view[2];
    const [cx, cy] = x === undefined ? [view[0] + view[2] / 2, view[1] + view[3] / 2] : [x, y];
    view = [cx - (cx - view[0]) * scale, cy - (cy - view[1]) * scale, width, view[3] * scale];
    apply();
  }
  function move(dx, dy) { view[0] += dx; view[1] += dy; apply(); }
  function point(event) {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [place.x, place.y];
  }

  // Inside another page the wheel scrolls that page until the picture has been clicked.
  const framed = window.self !== window.top;
  const active = () => !framed || stage.contains(document.activeElement);
  find("hint").textContent = framed ? "click the picture, then wheel to zoom, drag to move" : "wheel to zoom, drag to move";
  stage.addEventListener("wheel", (event) => {
    if (!active() && !event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.12 : 1 / 1.12, ...point(event));
  }, { passive: false });

  let drag = null;
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.target.closest("button")) return;
    drag = { x: event.clientX, y: event.clientY, moved: false };
  });
  window.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    const scale = 1 / svg.getScreenCTM().a;
    move(-dx * scale, -dy * scale);
    drag = { x: event.clientX, y: event.clientY, moved: true };
  });
  window.addEventListener("pointerup", () => { if (drag) setTimeout(() => { drag = null; }, 0); });
  stage.addEventListener("click", (event) => {
    if (event.target.closest("button") || (drag && drag.moved)) return;
    const hit = event.target.closest(".node");
    if (!hit) stage.focus({ preventScroll: true });
    const node = hit ? byKey.get(hit.dataset.node) : null;
    pick(node === picked ? null : node);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { pick(null); return; }
    if (!stage.contains(document.activeElement)) return;
    const step = view[2] / 12;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) { event.preventDefault(); move(...moves[event.key]); }
    if (event.key === "+" || event.key === "=") zoom(1 / 1.2);
    if (event.key === "-") zoom(1.2);
  });

  find("in").addEventListener("click", () => zoom(1 / 1.3));
  find("out").addEventListener("click", () => zoom(1.3));
  for (const kind of ["node", "edge"]) {
    find(kind + "Slider").addEventListener("input", () => { threshold[kind] = value(kind); update(); });
  }
  find("roles").addEventListener("change", update);
  function reset() {
    view = [...home];
    apply();
    for (const box of document.querySelectorAll("#roles input")) box.checked = true;
    find("nodeSlider").value = 0;
    find("edgeSlider").value = start;
    threshold.node = 0;
    threshold.edge = data.edgeThreshold;
    picked = null;
    update();
    rest();
  }
  find("reset").addEventListener("click", reset);
  find("download").addEventListener("click", () => {
    const copy = svg.cloneNode(true);
    copy.setAttribute("viewBox", home.join(" "));
    for (const el of copy.querySelectorAll(".gone")) el.remove();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
    link.download = "circuit.svg";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  reset();
})();
