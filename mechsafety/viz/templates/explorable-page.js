// The page: what is typed, chosen and shown. All texts reach the page as text, never as HTML.
const CLEARLY = 0.2; // share of the gap
const SAME = 0.02; // parts that differ less than this share of the largest difference do the same on both prompts
const MINUS = "\u2212", DASH = "\u2013";
const el = (id) => document.getElementById(id);
const ids = new Map(data.words.map((word, id) => [word, id]));
const twins = new Map(data.twins.flatMap(([bad, good]) => [[bad, good], [good, bad]]));
const harmful = new Set(data.twins.map(([bad]) => bad));
const edits = new Map(); // part -> "patch" or "zero"
let own = null, other = null, now = null; // runs: your prompt, the counterfactual, your prompt with the edits
let chosen = null, topic = "", step = 0, revealed = false;

const make = (tag, text = "", attributes = {}) => {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};
const shown = (value, digits = 2) => {
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(text) !== 0 ? MINUS : "") + text;
};
const percent = (share, digits = 0) => (share === null ? DASH : `${shown(100 * share, digits)}\u00a0%`);
const set = (id, value, text = shown(value)) => {
  el(id).textContent = value === null ? DASH : text;
  if (value === null) delete el(id).dataset.value;
  else el(id).dataset.value = String(value);
};
const lost = (score) => (other === null ? null : (own.score - score) / (own.score - other.score));
const quoted = (words) => words.map((word) => `“${word}”`).join(", ");

// ---- the prompt

// the counterfactual: the harmless word in place of each harmful one; if there is none, the reverse
function counterfactual(words) {
  const bad = words.some((word) => harmful.has(word));
  const swapped = words.map((word) => (twins.has(word) && harmful.has(word) === bad ? twins.get(word) : word));
  return { bad, words: swapped.join(" ") === words.join(" ") ? null : swapped };
}

function problemOf(words) {
  if (!words.length) return "The prompt is empty. Please type some words that the model knows.";
  const unknown = [...new Set(words.filter((word) => !ids.has(word) || data.special.includes(word)))];
  if (unknown.length) {
    const lower = unknown.map((word) => word.toLowerCase()).filter((word, k) => word !== unknown[k] && ids.has(word));
    const hint = lower.length ? ` It knows ${quoted(lower)}.` : "";
    const what = unknown.length === 1 ? "the word" : "the words";
    return `The model does not know ${what} ${quoted(unknown)}.${hint} It knows only the words in the list below.`;
  }
  if (words.length > data.longest) {
    return `The prompt has ${words.length} words. The model reads at most ${data.longest}.`;
  }
  return "";
}

function ask(text) {
  const words = text.split(/\s+/).filter(Boolean);
  const problem = problemOf(words);
  let kinds = []; // which prompt is harmful, your own or the other; empty without a counterfactual
  el("problem").textContent = problem;
  el("text").toggleAttribute("aria-invalid", Boolean(problem));
  own = other = now = null;
  el("outcome").textContent = "";
  if (problem) el("known").open = true;
  else {
    const tokens = (typed) => [...data.before, ...typed.map((word) => ids.get(word)), ...data.after];
    const twin = counterfactual(words);
    own = { ...forward(tokens(words)), words };
    if (twin.words) other = { ...forward(tokens(twin.words)), words: twin.words };
    else el("problem").textContent = "The prompt names nothing that has a counterfactual, such as " +
        `${quoted(data.twins[0])}. So nothing can be patched. Ablating works.`;
    kinds = twin.words ? (twin.bad ? ["harmful", "harmless"] : ["harmless", "harmful"]) : [];
    topic = words.find((word) => twins.has(word)) ?? DASH;
    if (!other) for (const [part, edit] of edits) if (edit === "patch") edits.delete(part);
  }
  showKinds(kinds);
  showSide("own", own, other);
  showSide("other", other, own);
  refresh();
}

// what is of the harmful prompt is orange, what is of the harmless one is blue
function showKinds([kind = "", otherKind = ""]) {
  document.documentElement.dataset.own = kind || "harmful";
  el("ownColour").textContent = kind === "harmless" ? "Blue" : "Orange";
  el("otherColour").textContent = kind === "harmless" ? "Orange" : "Blue";
  el("ownTitle").textContent = kind ? `Your prompt (${kind})` : "Your prompt";
  el("otherTitle").textContent = kind ? `The counterfactual prompt (${otherKind})` : "The counterfactual prompt";
  for (const name of document.querySelectorAll(".ownName")) name.textContent = kind || "typed";
  for (const name of document.querySelectorAll(".otherName")) name.textContent = otherKind || "counterfactual";
}

function showSide(side, run, beside) {
  const frame = (id) => make("span", data.words[id], { class: "frame" });
  const typed = run === null ? [] : run.words.map((word, k) =>
    make("span", word, beside && beside.words[k] !== word ? { class: "differs" } : {}));
  el(`${side}Tokens`).replaceChildren(
    ...(run === null ? [make("em", "none")] : [...data.before.map(frame), ...typed, ...data.after.map(frame)]));
  set(`${side}Score`, run && run.score);
  showWord(`${side}Word`, run);
}

function showWord(id, run) {
  const [word, probability] = run === null ? ["", 0] : firstWord(run.logits);
  el(id).textContent = run === null ? DASH : `${word} (${percent(probability, 1)})`;
}

// ---- the edits

function valuesOf(chosenEdits) {
  return new Map([...chosenEdits].map(([part, edit]) =>
    [part, edit === "patch" ? other.values.get(part) : new Float64Array(own.values.get(part).length)]));
}

const run = (chosenEdits, wire = null) =>
  forward([...data.before, ...own.words.map((word) => ids.get(word)), ...data.after], valuesOf(chosenEdits), wire);

// length of the difference of a part's output between the prompts, at the token where it is largest
function difference(part) {
  const [a, b] = [own.outputs.get(part), other.outputs.get(part)];
  let largest = 0;
  for (let start = 0; start < a.length; start += width) {
    let squares = 0;
    for (let k = start; k < start + width; k++) squares += (a[k] - b[k]) ** 2;
    largest = Math.max(largest, Math.sqrt(squares));
  }
  return largest;
}

// how far a part's output is from your prompt's (0) to the counterfactual's (1)
function moved(part) {
  const [from, to, at] = [own, other, now].map((one) => one.outputs.get(part));
  let along = 0, squares = 0;
  for (let k = 0; k < from.length; k++) {
    along += (at[k] - from[k]) * (to[k] - from[k]);
    squares += (to[k] - from[k]) ** 2;
  }
  return along / squares;
}

function refresh() {
  now = own && run(edits);
  set("nowScore", now && now.score);
  showWord("nowWord", now);
  const share = now && lost(now.score);
  set("nowShare", share, share === null ? "" : percent(share));
  showGauge();
  showParts();
  showPart();
  if (revealed) showTruth();
}

function showGauge() {
  const runs = { ownMark: own, otherMark: other, nowMark: now };
  const scores = Object.values(runs).filter(Boolean).map((one) => Math.abs(one.score));
  const reach = 1.15 * Math.max(8, ...scores);
  for (const [id, one] of Object.entries(runs)) {
    el(id).hidden = one === null;
    if (one) el(id).style.left = `${50 + (50 * one.score) / reach}%`;
  }
  el("gauge").setAttribute("aria-label", now === null ? "No log-odds" : `Log-odds of refusal: now ${shown(now.score)}, ` +
    `on your prompt ${shown(own.score)}` + (other ? `, on the counterfactual prompt ${shown(other.score)}` : ""));
}

const EDITED = { patch: "patched", zero: "ablated", none: "" };

function showParts() {
  const sizes = other && new Map(names.map((part) => [part, difference(part)]));
  const largest = other && Math.max(...sizes.values());
  for (const part of names) {
    const button = el(part);
    const edit = edits.get(part) ?? "none";
    const alike = other === null || sizes.get(part) < SAME * largest;
    const share = alike ? null : moved(part);
    const [bar, inner] = [button.querySelector(".bar > i"), button.querySelector(".bar > i > i")];
    bar.style.width = other ? `${(100 * sizes.get(part)) / largest}%` : "0";
    inner.style.width = share === null ? "0" : `${100 * Math.min(1, Math.max(0, share))}%`;
    button.querySelector(".moved").textContent = other === null ? DASH : alike ? "same on both" : percent(share);
    button.querySelector(".what").textContent =
      [revealed ? data.roles[part] ?? "idle" : "", EDITED[edit]].filter(Boolean).join(", ");
    button.dataset.edit = edit;
    button.dataset.moved = share === null ? "" : String(share);
    button.dataset.difference = other ? String(sizes.get(part)) : "";
    button.disabled = own === null;
    button.setAttribute("aria-pressed", String(part === chosen));
  }
  requestAnimationFrame(drawWires);
}

function showPart() {
  const ready = chosen !== null && own !== null;
  el("edit").hidden = !ready;
  el("undo").disabled = edits.size === 0;
  if (!ready) return;
  const [layer, name] = chosen.slice(1).split(".");
  const long = name === "MLP" ? `the MLP of layer ${layer}` : `head ${name.slice(1)} of layer ${layer}`;
  el("partTitle").textContent = `${chosen}: ${long}`;
  el("partText").textContent = other
    ? `Its output differs by ${shown(difference(chosen))} between the two prompts.` : "";
  const current = edits.get(chosen) ?? "none";
  for (const radio of document.querySelectorAll("[name=edit]")) {
    radio.checked = radio.value === current;
    radio.disabled = radio.value === "patch" && other === null;
  }
  showGuesses();
}

function showGuesses() {
  const wanted = document.querySelector("[name=edit]:checked").value;
  const same = wanted === (edits.get(chosen) ?? "none");
  for (const button of document.querySelectorAll("[data-guess]")) button.disabled = same;
}

const listed = () => [...edits].sort((a, b) => names.indexOf(a[0]) - names.indexOf(b[0]))
  .map(([part, edit]) => `${part} ${EDITED[edit]}`).join(", ") || "none";

function apply(guess) {
  const wanted = document.querySelector("[name=edit]:checked").value;
  const before = now.score;
  if (wanted === "none") edits.delete(chosen);
  else edits.set(chosen, wanted);
  refresh();
  report(before, guess);
  document.querySelector("[name=edit]:checked").focus({ preventScroll: true }); // the buttons are now off
}

function report(before, guess) {
  const change = other ? Math.abs(now.score - before) / Math.abs(own.score - other.score) : null;
  const did = change === null ? DASH : change < CLEARLY ? "hardly" : "clearly";
  const WORDS = { hardly: "hardly any change", clearly: "a clear change" };
  const parts = [`The log-odds went from ${shown(before)} to ${shown(now.score)}.`];
  if (change !== null) parts.push(`This is ${percent(change)} of the gap: ${WORDS[did]}.`);
  if (guess && change !== null) {
    parts.push(guess === did ? "You expected that." : `You expected ${WORDS[guess]}. What could explain it?`);
  }
  el("outcome").textContent = parts.join(" ");
  step += 1;
  el("noNotes").hidden = true;
  el("log").hidden = false;
  const share = lost(now.score);
  const cells = [[String(step), "num"], [topic], [listed()], [shown(now.score), "num"], [percent(share), "num"],
    [guess ? WORDS[guess] : DASH], [change === null ? DASH : WORDS[did]]];
  const row = make("tr");
  row.append(...cells.map(([text, kind]) => make("td", text, kind ? { class: kind } : {})));
  el("log").tBodies[0].append(row);
  boxes();
}

// ---- the diagram

function drawDiagram() {
  const line = (...parts) => {
    const made = make("div", "", { class: parts.length > 1 ? "line many" : "line" });
    made.append(...parts);
    return made;
  };
  const stop = (id, text) => make("div", text, { class: "stop", id });
  const part = (name) => {
    const button = make("button", "", { type: "button", class: "part", id: name, "aria-pressed": "false" });
    const bar = make("span", "", { class: "bar" });
    bar.append(make("i"));
    bar.firstChild.append(make("i"));
    button.append(make("b", name), bar, make("small", "", { class: "moved" }), make("small", "", { class: "what" }));
    button.addEventListener("click", () => {
      chosen = name;
      el("outcome").textContent = "";
      showParts();
      showPart();
      if (el("panel").getBoundingClientRect().top > innerHeight) el("panel").scrollIntoView({ block: "nearest" });
    });
    return button;
  };
  el("diagram").append(line(stop("embed", "the tokens")));
  for (let layer = 0; layer < data.layers; layer++) {
    const of = names.filter((name) => name.startsWith(`L${layer}.`));
    el("diagram").append(line(...of.slice(0, -1).map(part)), line(part(of.at(-1))));
  }
  el("diagram").append(line(stop("logits", "the first word of the reply")));
}

function drawWires() {
  const around = el("wires").getBoundingClientRect();
  const ends = (from, to) => {
    const [a, b] = [from, to].map((name) => el(name).getBoundingClientRect());
    const [x, y] = [a.left + a.width / 2 - around.left, a.bottom - around.top];
    const [u, v] = [b.left + b.width / 2 - around.left, b.top - around.top];
    const bend = (v - y) / 2;
    return `M${x} ${y}C${x} ${y + bend} ${u} ${v - bend} ${u} ${v}`;
  };
  const path = (d, kind) => {
    const made = document.createElementNS(el("wires").namespaceURI, "path");
    made.setAttribute("d", d);
    made.setAttribute("class", kind);
    return made;
  };
  if (revealed) {
    const drawn = data.edges.map(([from, to, slot]) => {
      const share = wireShare(from, to, slot);
      const made = path(ends(from, to), share === null ? "unknown" : "wire");
      const size = Math.min(1, Math.abs(share ?? 0));
      made.style.strokeWidth = `${1.5 + 9 * size}px`;
      made.style.strokeOpacity = share === null ? 1 : 0.25 + 0.75 * size;
      return made;
    });
    el("wires").replaceChildren(...drawn);
    return;
  }
  // nothing is told yet: every part reads everything that was written before it
  const rows = [...el("diagram").querySelectorAll(".line")].map((line) => [...line.children].map((one) => one.id));
  el("wires").replaceChildren(...rows.slice(1).flatMap((to, k) =>
    rows[k].flatMap((from) => to.map((name) => path(ends(from, name), "")))));
}

// share of the gap that is lost if this wire is patched besides the edits
function wireShare(from, to, slot) {
  if (other === null || now === null) return null;
  return (now.score - run(edits, { from, to, slot, run: other }).score) / (own.score - other.score);
}

// ---- the end

function showTruth() {
  const rows = [...names.filter((name) => name in data.roles).map((name) => [name]), ...data.backups];
  const alone = (parts, edit) => (own && (edit === "zero" || other) ? lost(run(new Map(parts.map((p) => [p, edit]))).score) : null);
  const cells = rows.map((parts) => {
    const pair = parts.length > 1;
    const backup = !pair && data.backups.some((group) => group.includes(parts[0]));
    const role = pair ? "backups, both together" : data.roles[parts[0]] + (backup ? ", backed up" : "");
    return [parts.join(" and "), role, pair || !other ? DASH : shown(difference(parts[0])),
      alone(parts, "patch"), alone(parts, "zero")];
  });
  fill("effects", cells);
  const wires = data.edges.map(([from, to, slot]) => [from, to, slot, wireShare(from, to, slot)]);
  fill("wireTable", wires.map(([from, to, slot, share]) => [place(from), place(to), SLOTS[slot], share]));
  const decoy = names.find((name) => data.roles[name] === "decoy");
  el("lesson").textContent = decoy && other ? `The decoy ${decoy}: patched, it loses ${percent(alone([decoy], "patch"))} of the gap. ` +
    `Ablated, it loses ${percent(alone([decoy], "zero"))}. A decoy writes a long vector that no part reads. ` +
    "On the two prompts the vector points in opposite directions but has the same length. " +
    "Zero removes the length too. The norms of later parts divide by the length of all that was written, so these parts notice it. " +
    "This is why ablating can mislead." : "";
}

const SLOTS = { q: "query", k: "key", v: "value", mlp: "input of the MLP", resid: "input of the logits" };
const place = (name) => ({ embed: "the tokens", logits: "the reply" })[name] ?? name;

function fill(id, rows) {
  el(id).tBodies[0].replaceChildren(...rows.map((row) => {
    const made = make("tr");
    made.append(...row.map((value) => {
      const share = typeof value === "number" || value === null;
      const cell = make("td", share ? percent(value) : value, share || /^[\d.\u2013]+$/.test(value) ? { class: "num" } : {});
      if (typeof value === "number") cell.dataset.value = String(value);
      return cell;
    }));
    return made;
  }));
  boxes();
}

const STAGES = {
  detection: "tells the end of the instruction whether the instruction names something harmful",
  evaluation: "decides there whether to refuse",
  decision: "moves this verdict to the last token",
  production: "writes the first word of the refusal",
  decoy: "writes a long vector that nothing reads",
};

function reveal() {
  revealed = true;
  const [decoy, ...pair] = ["decoy", "first", "second"].map((id) => el(id).value);
  const decoys = names.filter((name) => data.roles[name] === "decoy");
  const verdicts = [];
  const judge = (what, guess, right, truth) => verdicts.push(!guess
    ? `${what}: ${truth}. You made no guess.`
    : right ? `${what}: ${truth}. You found it.` : `${what}: ${truth}. You guessed ${guess}.`);
  if (decoys.length) judge("The decoy", decoy, decoys.includes(decoy), decoys.join(" and "));
  for (const group of data.backups) {
    const right = pair[0] !== pair[1] && pair.every((name) => group.includes(name));
    const guess = pair.filter(Boolean).join(" and ");
    judge("The two that back each other up", guess, right, group.join(" and "));
  }
  el("verdict").replaceChildren(...verdicts.map((text) => make("li", text)));
  el("roles").replaceChildren(...Object.entries(STAGES).flatMap(([role, text]) => {
    const parts = names.filter((name) => data.roles[name] === role);
    if (!parts.length) return [];
    const item = make("li");
    item.append(make("strong", `${parts.join(" and ")}: ${role}.`), ` Each ${text}.`.replace("Each", parts.length > 1 ? "Each" : "It"));
    return [item];
  }));
  el("truth").hidden = false;
  el("wireKey").hidden = false;
  el("orderKey").hidden = true;
  refresh();
}

// ---- the start

function start() {
  drawDiagram();
  el("example").append(make("option", "choose one", { value: "" }),
    ...data.examples.map((text) => make("option", text, { value: text })),
    ...data.examples.map((text) => counterfactual(text.split(" ")).words.join(" "))
      .map((text) => make("option", text, { value: text })));
  const known = data.words.filter((word) => !data.special.includes(word)).sort((a, b) => a.localeCompare(b, "en"));
  el("words").append(...known.map((word) => {
    const button = make("button", word, { type: "button" });
    button.addEventListener("click", () => {
      el("text").value = `${el("text").value.trimEnd()} ${word}`.trimStart();
    });
    return button;
  }));
  for (const id of ["decoy", "first", "second"]) {
    el(id).append(make("option", "I do not know", { value: "" }), ...names.map((name) => make("option", name, { value: name })));
  }
  el("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(el("text").value);
  });
  el("example").addEventListener("change", () => {
    if (!el("example").value) return;
    el("text").value = el("example").value;
    ask(el("text").value);
  });
  el("edit").addEventListener("submit", (event) => event.preventDefault());
  el("edit").addEventListener("change", showGuesses);
  for (const button of document.querySelectorAll("[data-guess]")) {
    button.addEventListener("click", () => apply(button.dataset.guess));
  }
  el("undo").addEventListener("click", () => {
    const before = now && now.score;
    edits.clear();
    refresh();
    if (now) report(before, "");
    (chosen ? el(chosen) : el("panel")).focus({ preventScroll: true });
  });
  el("guess").addEventListener("submit", (event) => {
    event.preventDefault();
    reveal();
  });
  window.addEventListener("resize", () => requestAnimationFrame(drawWires));
  el("text").value = data.examples[0];
  ask(data.examples[0]);
}
