"use strict";
const main = document.querySelector("main"), form = document.getElementById("controls");
const rows = [...main.children];
const texts = rows.map(row => row.textContent.toLowerCase());
const wanted = name => form.elements[name] ? form.elements[name].value : "";
function show() {
  const [key, sign] = wanted("sort").split(","), text = wanted("text").toLowerCase();
  let shown = 0;
  rows.forEach((row, i) => {
    const fits = (!wanted("section") || row.dataset.section === wanted("section"))
      && (!wanted("flag") || row.dataset.flags.split(" ").includes(wanted("flag"))) && texts[i].includes(text);
    row.hidden = !fits;
    shown += fits;
  });
  const order = key ? [...rows].sort((a, b) => sign * (a.dataset[key] - b.dataset[key])) : rows;
  main.append(...order);
  form.elements.shown.value = `${shown} of ${rows.length} rows`;
}
function move(step) {
  const seen = [...main.children].filter(row => !row.hidden), at = seen.indexOf(document.activeElement.closest("article"));
  const next = seen[Math.max(0, Math.min(seen.length - 1, at + step))];
  if (next) { next.focus(); next.scrollIntoView({block: "start"}); }
}
form.addEventListener("input", show);
form.addEventListener("submit", event => event.preventDefault());
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") document.activeElement.blur();
  if (event.target.closest("input, select")) return;
  if (event.key === "/") { event.preventDefault(); form.elements.text.focus(); }
  if (event.key === "j") move(1);
  if (event.key === "k") move(-1);
});
form.hidden = false;
show();
