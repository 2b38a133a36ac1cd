// Whole contexts: choose a token, see which latents fire there.

function promptsPage(side, sides) {
  const list = el("div.strongest.card", {}, el("p.note", {}, "Choose a token to see its strongest latents."));
  const texts = el("div.prompts", {}, ...side.prompts.map((prompt) => promptText(side, prompt, list)));
  const other = sides.length > 1 ? el("span.switch", {}, ...sides.map((s) =>
    el(s === side ? "a.on" : "a", { href: `#/prompts/${s.letter}` }, el(`span.key.${s.letter}`), s.name))) : null;
  return el("div", {}, el("h1", {}, "Texts"), el("p.lead", {}, "The first contexts that were looked at. Every token is a button; its colour is the size of its strongest latent."),
    el("div.controls", {}, other), el("div.beside", {}, texts, list));
}

function promptText(side, prompt, list) {
  const first = prompt.ids.length - prompt.latents.length;
  const most = Math.max(...prompt.values.map((v) => Math.abs(v[0] ?? 0)), 1e-9);
  return el("p.sequence-free.card", {}, ...prompt.ids.map((id, i) => {
    const found = i >= first ? prompt.latents[i - first] : [];
    const values = i >= first ? prompt.values[i - first] : [];
    const node = token(side.text(id), values[0] ?? null, { most, label: found.length ? `strongest: latent ${found[0]}, ${number(values[0])}` : "not counted" });
    node.setAttribute("role", "button");
    node.tabIndex = found.length ? 0 : -1;
    const choose = () => {
      document.querySelector(".t.chosen")?.classList.remove("chosen");
      node.classList.add("chosen");
      list.replaceChildren(...strongest(side, id, found, values));
    };
    node.addEventListener("click", choose);
    node.addEventListener("keydown", (event) => event.key === "Enter" && choose());
    return node;
  }));
}

function strongest(side, id, found, values) {
  return [el("h3", {}, "Strongest latents on ", chip(side.text(id))),
    found.length ? el("ol.related", {}, ...found.map((latent, i) => el("li", {}, el("a", { href: side.route(latent) }, String(latent)), " ",
      chip(side.text(side.columns.peak[latent])), el("span.number", {}, number(values[i]))))) : el("p.note", {}, "This token is special or has no activation row: it is not counted.")];
}
