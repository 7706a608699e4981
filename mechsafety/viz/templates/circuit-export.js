// What is shown now as SVG and as TikZ, in the light colours; and the dialog.
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
