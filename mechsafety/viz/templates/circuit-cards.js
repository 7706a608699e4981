// The column: cards of nodes, attention, pins, ablations; and messages to the page around this one.
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
function leave() { if (!picked || current !== picked) rest(); }
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
  const info = data.nodes[node.key], title = add(panel, "h2", named(node.key));
  if (!info) {
    add(panel, "p", node.els[0].querySelector("title").textContent);
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
    for (const el of node.els) {
      const body = el.querySelector("path");
      if (!el.dataset.fill) el.dataset.fill = body.getAttribute("fill");
      body.setAttribute("fill", (one && one.fills[node.key]) || el.dataset.fill);
    }
  }
  rest();
}

// ---- the page around this one (a notebook widget) ----
function tell() {
  if (framed) window.parent.postMessage({ mechsafety: 1, selected: picked ? picked.key : "", ablated: [...ablating] }, "*");
}
window.addEventListener("message", (event) => {
  if (event.source !== window.parent || !event.data || event.data.mechsafety !== 1 || !event.data.ablation) return;
  setAblation(event.data.ablation.nodes.length ? event.data.ablation : null);
});
