// Whole contexts: choose a token, see which latents fire there.

function promptsPage(side, sides) {
  const list = el("div.strongest.card", {}, el("p.note", {}, "Choose a token to see its strongest latents."));
  const painted = [];
  const texts = el("div.prompts", {}, ...side.prompts.map((prompt) => promptText(side, prompt, painted, list)));
  const other = sides.length > 1 ? el("span.switch", {}, ...sides.map((s) =>
    el(s === side ? "a.on" : "a", { href: `#/prompts/${s.letter}` }, el(`span.key.${s.letter}`), s.name))) : null;
  return el("div", {}, el("h1", {}, "Texts"), el("p.lead", {}, "The first contexts that were looked at. Every token is a button."),
    el("div.controls", {}, other), el("div.beside", {}, texts, list));
}

function promptText(side, prompt, painted, list) {
  const first = prompt.ids.length - prompt.latents.length;
  return el("p.sequence-free.card", {}, ...prompt.ids.map((id, i) => {
    const found = i >= first ? prompt.latents[i - first] : [];
    const values = i >= first ? prompt.values[i - first] : [];
    const label = found.length ? `strongest: latent ${found[0]}, ${number(values[0])}` : "not counted";
    const node = token(side.text(id), 0, { most: 1, label });
    painted.push({ node, found, values });
    node.setAttribute("role", "button");
    node.setAttribute("aria-label", `${JSON.stringify(side.text(id))}, ${label}`);
    node.tabIndex = found.length ? 0 : -1;
    const choose = () => {
      document.querySelector(".t.chosen")?.classList.remove("chosen");
      node.classList.add("chosen");
      list.replaceChildren(...strongest(side, id, found, values, painted));
      if (found.length) paint(painted, found[0]);
    };
    node.addEventListener("click", choose);
    node.addEventListener("keydown", (event) => ["Enter", " "].includes(event.key) && (event.preventDefault(), choose()));
    return node;
  }));
}

// Colours every token by one latent, where it is among the token's strongest.
function paint(painted, latent) {
  const size = ({ found, values }) => Math.abs(values[found.indexOf(latent)] ?? 0);
  const most = Math.max(...painted.map(size), 1e-9);
  for (const one of painted) shade(one.node, one.values[one.found.indexOf(latent)] ?? 0, most);
}

function strongest(side, id, found, values, painted) {
  if (!found.length) return [el("p.note", {}, "This token is special or has no activation row: it is not counted.")];
  const rows = found.map((latent, i) => {
    const row = el("li", {}, el("a", { href: side.route(latent) }, String(latent)), " ", chip(side.text(side.columns.peak[latent])), el("span.number", {}, number(values[i])));
    row.addEventListener("pointerenter", () => paint(painted, latent));
    return row;
  });
  return [el("h3", {}, "Strongest latents on ", chip(side.text(id))), el("ol.related", {}, ...rows),
    el("p.note", {}, "The texts are coloured by the latent under the pointer, at first by the strongest, on the tokens where it is among the strongest.")];
}
