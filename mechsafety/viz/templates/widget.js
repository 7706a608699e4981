// The circuit's page in a frame without origin; selection and ablations travel as messages.
function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-scripts allow-downloads");
  frame.setAttribute("title", "Refusal circuit");
  frame.style.cssText = `width:100%;height:${model.get("height")}px;border:1px solid #d5d9df;border-radius:8px`;
  frame.srcdoc = model.get("page");
  const note = document.createElement("p");
  const hear = (event) => {
    if (event.source !== frame.contentWindow || !event.data || event.data.mechsafety !== 1) return;
    model.set("selected", event.data.selected);
    // only a change reruns the model
    if (JSON.stringify(event.data.ablated) !== JSON.stringify(model.get("ablated"))) model.set("ablated", event.data.ablated);
    model.save_changes();
  };
  const tell = () => frame.contentWindow.postMessage({ mechsafety: 1, ablation: model.get("ablation") }, "*");
  const say = () => { note.textContent = model.get("message"); };
  window.addEventListener("message", hear);
  model.on("change:ablation", tell);
  model.on("change:message", say);
  el.append(frame, note);
  return () => window.removeEventListener("message", hear);
}
export default { render };
