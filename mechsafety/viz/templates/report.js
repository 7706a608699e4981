"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (head.classList.contains("fixed")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.replace("\u2212", "-");
      const order = (a, b) => {
        const difference = Number(key(a)) - Number(key(b));
        return Number.isNaN(difference) ? key(a).localeCompare(key(b), "en", { numeric: true }) : difference;
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? order(a, b) : order(b, a)));
      table.tBodies[0].append(...rows);
    });
  });
}
// a box that scrolls can be reached by the keyboard; one that does not is no stop of the Tab key
function boxes() {
  for (const box of document.querySelectorAll(".box, figure")) {
    if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) {
      const above = [...box.closest("section").querySelectorAll("h2, h3")];
      const heading = above.findLast((el) => el.compareDocumentPosition(box) & Node.DOCUMENT_POSITION_FOLLOWING);
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", heading.textContent + ": scroll for the rest");
    } else for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
  }
}
boxes();
window.addEventListener("resize", boxes);
window.addEventListener("load", boxes);
