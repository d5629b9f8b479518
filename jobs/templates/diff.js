
"use strict";
(() => {
  const of = (id) => document.getElementById(id);
  const outcome = of("outcome"), tag = of("tag"), words = of("words");
  const articles = [...document.querySelectorAll("article")].map((element) => ({
    element,
    outcome: element.dataset.outcome,
    tags: JSON.parse(element.dataset.tags),
    text: `${element.querySelector("h3").textContent} ${element.dataset.id}`.toLowerCase(),
  }));
  const visible = () => articles.filter((one) => !one.element.hidden).map((one) => one.element);

  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const one of articles) {
      one.element.hidden =
        (outcome.value !== "" && one.outcome !== outcome.value) ||
        (tag.value !== "" && !one.tags.includes(tag.value)) ||
        !wanted.every((word) => one.text.includes(word));
    }
    const count = visible().length;
    of("count").textContent = `${count} of ${articles.length} shown`;
    of("none").hidden = count > 0 || articles.length === 0;
  };

  const go = (step) => {
    const shown = visible();
    if (shown.length === 0) return;
    const here = shown.indexOf(document.activeElement?.closest("article"));
    const next = here < 0 ? (step > 0 ? 0 : shown.length - 1) : here + step;
    const target = shown[Math.min(Math.max(next, 0), shown.length - 1)];
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "start" });
  };

  for (const control of [outcome, tag, words]) control.addEventListener("input", filter);
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
    if (event.key === "Escape" && document.activeElement === words) {
      words.value = "";
      filter();
      words.blur();
    } else if (!typing && (event.key === "j" || event.key === "k")) {
      event.preventDefault();
      go(event.key === "j" ? 1 : -1);
    } else if (!typing && event.key === "/") {
      event.preventDefault();
      words.focus();
    }
  });
  filter(); // a browser may have kept what was chosen before it was loaded again
})();
