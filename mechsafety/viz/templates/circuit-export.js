// What is shown now as SVG and as TikZ, in the light colours; and the dialog.
// panes that are shown stand side by side on a sheet of Python's, each under its name
function shownPanes() {
  const shown = panes.filter((pane) => !pane.el.hidden);
  if (shown.length === 1) return { places: [{ pane: shown[0], x: 0, y: 0 }], size: shown[0].full };
  const sheet = new DOMParser().parseFromString(data.sides.sheet, "image/svg+xml").documentElement;
  const places = data.sides.places.map(([i, x, y]) => ({ pane: panes[i], x, y }));
  return { places, sheet, size: ["width", "height"].map((name) => sheet.getAttribute(name)) };
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
  const { places, sheet } = shownPanes();
  if (!sheet) return cleaned(places[0].pane);
  for (const text of sheet.querySelectorAll("text")) text.removeAttribute("data-tex");
  for (const { pane, x, y } of places) {
    const copy = cleaned(pane);
    for (const [name, part] of Object.entries({ x, y, width: pane.full[0], height: pane.full[1] })) copy.setAttribute(name, part);
    sheet.append(copy);
  }
  return sheet;
}
function saveSvg() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(shownSvg())], { type: "image/svg+xml" }));
  link.download = "circuit.svg";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// The TikZ of all parts would be two thirds of the page more. So it is made of the SVG that Python drew: the same paths,
// colours and sizes in another language. What LaTeX needs written otherwise comes with each text.
function tikz() {
  const { places, sheet, size } = shownPanes(), lines = [], colours = new Set();
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
    const get = (key) => (el.closest(`[${key}]`) || el).getAttribute(key), height = pt(get("font-size"));
    const font = `${data.latex[0]}\\fontsize{${height}}{${height}}\\selectfont${get("font-weight") === "600" ? "\\bfseries" : ""}`;
    const options = `anchor=${anchors[get("text-anchor") || "start"]}, text=${name(get("fill"))}, font=${font}`;
    return `\\node[${options}] at (${get("x")},${get("y")}) {${el.dataset.tex || el.textContent}};`;
  }
  for (const el of sheet ? sheet.querySelectorAll("text") : []) lines.push(text(el));
  for (const { pane, x, y } of places) {
    if (sheet) lines.push(`\\begin{scope}[xshift=${pt(x)}, yshift=-${pt(y)}]`);
    for (const el of pane.svg.querySelectorAll("path, text")) {
      if (!el.closest(".gone")) lines.push(el.tagName === "text" ? text(el) : path(el));
    }
    if (sheet) lines.push("\\end{scope}");
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
  find("dialogText").textContent = `The picture as TikZ. A paper needs \\usepackage{tikz}. ${data.latex[1]}`;
  area.value = text;
  area.hidden = false;
  find("dialog").showModal();
  area.select();
  // frames without leave to use the clipboard keep the selected text on show
  const done = () => { find("dialogText").textContent = `Copied. A paper needs \\usepackage{tikz}. ${data.latex[1]}`; };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => {});
}

function help() {
  find("dialogText").textContent = [
    "/  search, Enter goes to the next one found", "Tab  to the picture; an arrow goes to a part of it",
    "↑ ↓  on a part: along its strongest edge;  ← →  within its row", "Enter  its paths;  p  pin;  f  fold its group",
    "Shift and arrows: move the picture;  + − 0  zoom",
    "d  dark or light;  Escape  clear",
  ].join("\n");
  find("dialogArea").hidden = true;
  find("dialog").showModal();
}
