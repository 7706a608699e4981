"use strict";
(() => {
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
  const start = Math.sqrt(data.edgeThreshold / most.edge) * 200;
  const toggle = (item, name, on) => item.els.forEach(({ el }) => el.classList.toggle(name, on));
  const anchor = (key) => {
    const node = nodes.get(key);
    return node.group && folded.has(node.group) ? supers.get("group:" + node.group) : node;
  };

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

  // ---- cards ----
  function add(parent, tag, text, className) {
    const el = document.createElement(tag);
    if (text !== undefined) el.textContent = text;
    if (className) el.className = className;
    parent.append(el);
    return el;
  }

  let current = null;
  // leaving a part brings back the card of what was clicked, and leaves it alone where it is still there
  const leave = () => { if (!picked || current !== picked) rest(); };
  function rest() {
    if (picked) {
      const up = reached(reach(picked.key, "to", "from").seen), down = reached(reach(picked.key, "from", "to").seen);
      showNode(picked, `${up} nodes upstream, ${down} downstream`);
    } else showText("Nothing selected", "Point at a part or an edge for its numbers. Click a part for every path into and out of it.");
  }

  function showText(title, text) {
    current = null;
    const panel = find("card");
    panel.replaceChildren();
    panel.className = "card";
    add(panel, "h2", title);
    add(panel, "p", text);
  }

  function showNode(node, note) {
    if (node === picked && !note) { leave(); return; }
    current = node;
    const panel = find("card");
    panel.replaceChildren();
    panel.className = "card";
    fillCard(panel, node, note, pins.includes(node));
  }

  function fillCard(panel, node, note, isPinned) {
    const info = data.nodes[node.key], title = add(panel, "h2", node.key);
    if (!info) {
      add(panel, "p", node.els[0].el.querySelector("title").textContent);
      if (note) add(panel, "p", note);
      if (node.kind === "group") {
        const button = add(title, "button", "unfold");
        button.type = "button";
        button.addEventListener("click", () => fold(node.group, false));
      }
      return;
    }
    const pin = add(title, "button", isPinned ? "unpin" : "pin");
    pin.type = "button";
    pin.dataset.pin = node.key;
    pin.addEventListener("click", () => setPin(node, !isPinned));
    if (note) add(panel, "p", note);
    if (data.ablate) {
      const label = add(panel, "label", " ablate"), box = document.createElement("input");
      box.type = "checkbox";
      box.checked = ablating.has(node.key);
      box.dataset.ablate = node.key;
      box.addEventListener("change", () => {
        if (box.checked) ablating.add(node.key); else ablating.delete(node.key);
        tell();
      });
      label.prepend(box);
    }
    const list = add(panel, "dl");
    for (const [name, text] of rowsOf(info)) { add(list, "dt", name); add(list, "dd", text); }
    if (ablation) {
      add(list, "dt", "after ablation");
      const after = ablation.effects[node.key];
      add(list, "dd", ablation.nodes.includes(node.key) ? "ablated" : after === undefined ? "not measured again" : after.toFixed(3));
    }
    if (info.evidence.length) {
      add(panel, "h3", "what the role rests on");
      const facts = add(panel, "ul");
      for (const [place, text] of info.evidence) add(facts, "li", `${data.words.evidence[place]}: ${text}`);
    }
    for (const [name, words] of [["promotes", "raises these tokens, directly"], ["suppresses", "lowers these tokens, directly"]]) {
      if (!info[name]) continue;
      add(panel, "h3", words);
      const row = add(panel, "div", undefined, "tokens");
      for (const token of info[name]) add(row, "span", token);
    }
    if (info.spans) {
      add(panel, "h3", "mean attention of the last token to spans");
      for (const [name, share] of info.spans) {
        const row = add(panel, "div", undefined, "meter");
        add(row, "span", name);
        const bar = add(add(row, "span"), "i");
        bar.style.display = "block";
        bar.style.width = `${100 * share}%`;
        add(row, "span", share.toFixed(2));
      }
    }
    for (const [tokens, values] of info.texts || []) {
      add(panel, "h3", "activation over text");
      const top = Math.max(...values.map(Math.abs)) || 1, row = add(panel, "div", undefined, "tokens text");
      tokens.forEach((token, i) => {
        const span = add(row, "span", token);
        span.style.background = blend(values[i] < 0 ? "#D55E00" : "#0072B2", (0.75 * Math.abs(values[i])) / top);
        span.title = String(values[i]);
      });
    }
    attention(panel, node.key);
  }

  function blend(colour, strength) {
    const part = (i) => Math.round(strength * parseInt(colour.slice(i, i + 2), 16) + (1 - strength) * 255);
    return "#" + [1, 3, 5].map((i) => part(i).toString(16).padStart(2, "0")).join("");
  }

  // ---- attention of a head over the prompt: matrix, and tokens shaded by what one of them looks at ----
  let chosenPrompt = 0;
  function attention(panel, key) {
    const examples = data.attention.filter((example) => example.heads[key]);
    if (!examples.length) {
      if (!data.names && /\.H\d+$/.test(key)) add(panel, "p", "attention not recorded for this head", "small");
      return;
    }
    const example = examples[Math.min(chosenPrompt, examples.length - 1)], count = example.tokens.length;
    add(panel, "h3", "attention over the prompt");
    const select = add(panel, "select");
    examples.forEach((one, i) => { add(select, "option", one.prompt).value = i; });
    select.value = String(examples.indexOf(example));
    select.setAttribute("aria-label", "Prompt");
    const bytes = Uint8Array.from(atob(example.heads[key]), (char) => char.charCodeAt(0));
    const canvas = add(panel, "canvas");
    canvas.width = canvas.height = count;
    const pen = canvas.getContext("2d"), image = pen.createImageData(count, count);
    bytes.forEach((byte, i) => {
      const share = Math.sqrt(byte / 255);
      image.data.set([255 - 255 * share, 255 - 141 * share, 255 - 77 * share, 255], 4 * i);
    });
    pen.putImageData(image, 0, 0);
    const note = add(panel, "p", "", "small"), row = add(panel, "div", undefined, "tokens text looks");
    const spans = example.tokens.map((token, i) => {
      const span = add(row, "span", token);
      span.addEventListener("pointerenter", () => look(i));
      return span;
    });
    function look(from, to) {
      const line = bytes.subarray(from * count, (from + 1) * count);
      spans.forEach((span, i) => {
        span.style.background = blend("#0072B2", Math.sqrt(line[i] / 255) * 0.85);
        span.classList.toggle("query", i === from);
      });
      const best = to === undefined ? line.indexOf(Math.max(...line)) : to;
      note.textContent = `${example.tokens[from]} looks at ${example.tokens[best]}: ${(line[best] / 255).toFixed(2)}`;
    }
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), at = (part, length) => Math.min(count - 1, Math.max(0, Math.floor((part / length) * count)));
      look(at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width));
    });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "Attention matrix: rows look, columns are looked at");
    select.addEventListener("change", () => { chosenPrompt = Number(select.value); rest(); drawPins(); });
    look(count - 1);
  }

  // ---- pins ----
  function setPin(node, on) {
    const place = pins.indexOf(node);
    if (on && place < 0) pins.push(node);
    if (!on && place >= 0) pins.splice(place, 1);
    toggle(node, "pinned", on);
    drawPins();
    rest();
  }
  function drawPins() {
    const panel = find("pins");
    panel.replaceChildren();
    panel.hidden = !pins.length;
    for (const node of pins) fillCard(add(panel, "div", undefined, "card"), node, "pinned", true);
  }

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

  // ---- ablations ----
  data.ablations.forEach((one, i) => { add(find("ablationSelect"), "option", one.name).value = i; });
  find("ablationSelect").addEventListener("change", (event) => setAblation(data.ablations[event.target.value] || null));
  function setAblation(one) {
    ablation = one;
    find("ablationText").textContent = one ? one.text : "";
    find("ablation").hidden = !one && !data.ablations.length;
    for (const node of drawn) {
      const after = one && one.effects[node.key], gone = Boolean(one) && one.nodes.includes(node.key);
      toggle(node, "ablated", gone);
      toggle(node, "unknown", Boolean(one) && !gone && after === undefined);
      for (const { el } of node.els) {
        const body = el.querySelector("path");
        if (!el.dataset.fill) el.dataset.fill = body.getAttribute("fill");
        const strength = 0.42 + 0.58 * Math.sqrt(Math.min(1, Math.abs(after || 0) / most.node));
        body.setAttribute("fill", one && !gone && after !== undefined ? blend(data.colours[node.role], after ? strength : 0) : el.dataset.fill);
      }
    }
    rest();
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

  // ---- exports: what is shown now, in the light colours ----
  // panes that are shown stand side by side, each under its name
  const GAP = 20, HEAD = 24;
  function shownPanes() {
    const shown = panes.filter((pane) => !pane.el.hidden);
    if (shown.length === 1) return { places: [{ pane: shown[0], x: 0, y: 0 }], size: shown[0].full };
    let x = 0;
    const places = shown.map((pane) => { const place = { pane, x, y: HEAD }; x += pane.full[0] + GAP; return place; });
    return { places, size: [x - GAP, HEAD + Math.max(...shown.map((pane) => pane.full[1]))] };
  }
  function cleaned(pane) {
    const copy = pane.svg.cloneNode(true);
    copy.setAttribute("viewBox", `0 0 ${pane.full.join(" ")}`);
    for (const el of copy.querySelectorAll(".gone")) el.remove();
    for (const el of [copy, ...copy.querySelectorAll("[class],[tabindex]")]) {
      for (const name of ["tabindex", "role", "aria-label", "class", "data-tex"]) el.removeAttribute(name);
    }
    return copy;
  }
  function shownSvg() {
    const { places, size } = shownPanes();
    if (places.length === 1) return cleaned(places[0].pane);
    const whole = make("svg", { width: size[0], height: size[1], viewBox: `0 0 ${size.join(" ")}` });
    whole.append(make("rect", { width: size[0], height: size[1], fill: "#FFFFFF" }));
    for (const { pane, x, y } of places) {
      const copy = cleaned(pane), font = copy.getAttribute("font-family");
      for (const [name, part] of Object.entries({ x, y, width: pane.full[0], height: pane.full[1] })) copy.setAttribute(name, part);
      whole.append(make("text", { x: x + 12, y: 16, "font-family": font, "font-size": 13, "font-weight": 600, fill: "#1B1F24" }, pane.name), copy);
    }
    return whole;
  }
  function saveSvg() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(shownSvg())], { type: "image/svg+xml" }));
    link.download = "circuit.svg";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function tikz() {
    const { places, size } = shownPanes(), lines = [], colours = new Set();
    const name = (colour) => { colours.add(colour.slice(1).toLowerCase()); return "c" + colour.slice(1).toLowerCase(); };
    const pt = (pixels) => `${Number((0.75 * pixels).toPrecision(4))}bp`;
    const anchors = { start: "base west", middle: "base", end: "base east" };
    function path(el) {
      const get = (key) => (key === "fill" ? el.closest("[fill]") : el).getAttribute(key), options = [];
      if (get("fill") !== "none") options.push(`fill=${name(get("fill"))}`);
      if (get("stroke")) options.push(`draw=${name(get("stroke"))}`, `line width=${pt(get("stroke-width") || 1)}`);
      const dashes = (get("stroke-dasharray") || "").split(" ").filter(Boolean);
      if (dashes.length) options.push("dash pattern=" + dashes.map((part, i) => `${i % 2 ? "off" : "on"} ${pt(part)}`).join(" "));
      let x = 0, y = 0;
      const steps = get("d").match(/[a-zA-Z][^a-zA-Z]*/g).map((step) => {
        const n = (step.slice(1).match(/-?[\d.]+/g) || []).map(Number), letter = step[0].toUpperCase();
        const [x0, y0] = step[0] === letter ? [0, 0] : [x, y];
        if (letter === "H") n.push(y - y0);
        if (letter === "V") n.unshift(x - x0);
        const points = [];
        for (let i = 0; i < n.length; i += 2) points.push([x0 + n[i], y0 + n[i + 1]]);
        if (points.length) [x, y] = points[points.length - 1];
        const at = ([a, b]) => `(${Number(a.toFixed(1))},${Number(b.toFixed(1))})`;
        if (letter === "Z") return "-- cycle";
        if (letter === "C") return `.. controls ${at(points[0])} and ${at(points[1])} .. ${at(points[2])}`;
        return (letter === "M" ? "" : "-- ") + at(points[0]);
      });
      return `\\path[${options.join(", ")}] ${steps.join(" ")};`;
    }
    function text(el) {
      const get = (key) => (el.closest(`[${key}]`) || el).getAttribute(key), pixels = Number(get("font-size"));
      const font = `\\sffamily\\fontsize{${pt(pixels)}}{${pt(pixels)}}\\selectfont${get("font-weight") === "600" ? "\\bfseries" : ""}`;
      const options = `anchor=${anchors[get("text-anchor") || "start"]}, text=${name(get("fill"))}, font=${font}`;
      // texts that LaTeX needs written otherwise carry their LaTeX; a count that was changed here is plain
      return `\\node[${options}] at (${get("x")},${get("y")}) {${el.dataset.tex && !/edges\sdrawn/.test(el.textContent) ? el.dataset.tex : latex(el.textContent)}};`;
    }
    const latex = (words) => words.replace(/[^\x20-\x7e]/g, " ").replace(/[\\{}$&#_%~^]/g, (char) =>
      ({ "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" })[char] || "\\" + char);
    for (const { pane, x, y } of places) {
      if (places.length > 1) {
        lines.push(`\\begin{scope}[xshift=${pt(x)}, yshift=-${pt(y)}]`);
        lines.push(`\\node[anchor=base west, text=${name("#1b1f24")}, font=\\sffamily\\bfseries] at (12,-8) {${latex(pane.name)}};`);
      }
      for (const el of pane.svg.querySelectorAll("path, text")) {
        if (!el.closest(".gone")) lines.push(el.tagName === "text" ? text(el) : path(el));
      }
      if (places.length > 1) lines.push("\\end{scope}");
    }
    return [
      "\\begingroup",
      ...[...colours].sort().map((colour) => `\\definecolor{c${colour}}{HTML}{${colour.toUpperCase()}}`),
      "\\begin{tikzpicture}[x=0.75bp, y=-0.75bp, inner sep=0pt]",
      `\\path[use as bounding box] (0,0) rectangle (${size.join(",")});`,
      ...lines, "\\end{tikzpicture}\\endgroup", "",
    ].join("\n");
  }
  function copyTikz() {
    const text = tikz(), area = find("dialogArea");
    find("dialogText").textContent = "The picture as TikZ. A paper needs \\usepackage{tikz}.";
    area.value = text;
    area.hidden = false;
    find("dialog").showModal();
    area.select();
    // frames without leave to use the clipboard keep the selected text on show
    const done = () => { find("dialogText").textContent = "Copied. A paper needs \\usepackage{tikz}."; };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => {});
  }

  function help() {
    find("dialogText").textContent = [
      "/  search, Enter goes to the next one found", "Tab  next part;  Enter  its paths;  p  pin;  f  fold its group",
      "↑ ↓  on a part: along its strongest edge;  ← →  within its row", "arrows on the picture: move;  + − 0  zoom",
      "d  dark or light;  Escape  clear",
    ].join("\n");
    find("dialogArea").hidden = true;
    find("dialog").showModal();
  }

  // ---- views of a comparison ----
  function setView(both) {
    panes.forEach((pane, i) => { pane.el.hidden = panes.length > 1 && (both ? i === 0 : i > 0); });
    if (find("key")) find("key").hidden = !both;
    first();
  }
  for (const box of document.querySelectorAll("#views input")) box.addEventListener("change", () => setView(box.value === "1"));

  // ---- the page around this one (a notebook widget) ----
  function tell() {
    if (framed) window.parent.postMessage({ mechsafety: 1, selected: picked ? picked.key : "", ablated: [...ablating] }, "*");
  }
  window.addEventListener("message", (event) => {
    if (event.source !== window.parent || !event.data || event.data.mechsafety !== 1 || !event.data.ablation) return;
    setAblation(event.data.ablation.nodes.length ? event.data.ablation : null);
  });

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
    find("edgeSlider").value = start;
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
  setView(false);
  reset();
  for (const name of data.fold) if (document.querySelector(`[data-fold="${CSS.escape(name)}"]`)) fold(name, true);
})();
