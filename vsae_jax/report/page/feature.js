// One latent: what it fires on, what it makes likely, what goes with it.

async function featurePage(side, latent, views) {
  const other = side.columns.partner ? views[1 - side.index].side : null;
  const partner = other ? side.columns.partner[latent] : -1;
  const panels = [await panel(side, latent)];
  if (other) panels.push(partner >= 0 ? await panel(other, partner) : el("section.panel", {}, el("p.note", {}, `No latent of ${other.name} is matched to this one.`)));
  const view = views[side.index];
  const step = (by, name) => el("a.step", { href: side.route(view.beside(latent, by)), title: `${name} (${by < 0 ? "←" : "→"})` }, by < 0 ? "← previous" : "next →");
  const match = other && partner >= 0 ? el("span.soft", {}, `decoder cosine of the pair ${number(side.columns.cosine[latent])}`) : null;
  return el("div", {},
    el("div.controls", {}, step(-1, "previous"), el("a", { href: `#/table/${side.letter}` }, "all latents"), step(1, "next"), match),
    el(panels.length > 1 ? "div.pair" : "div", {}, ...panels));
}

async function panel(side, latent) {
  const title = el("h1", {}, el(`span.key.${side.letter}`), `Latent ${latent}`, el("small", {}, side.name));
  const f = await side.full_of(latent);
  const stats = statistics(side, latent, f);
  if (!f) return inBrief(side, latent, title, stats);
  if (!alive(side, latent)) return el("section.panel", {}, title, stats, el("p.note", {}, "It fires on none of the tokens looked at; what it would make likely is below."), logits(side, f), related(side, f));
  return el("section.panel", {}, title, stats,
    el("h2", {}, "Strongest activations"), el("div.card", {}, ...sequences(side, f, f.top)),
    synthetic(f),
    el("h2", {}, "Effect on the logits"), logits(side, f),
    el("h2", {}, "Activations"), el("div.figures", {}, activations(side, f), related(side, f)),
    el("h2", {}, "From strong to weak"), ...groups(side, f));
}

// Of most latents of a wide autoencoder the page has only this, which keeps it small.
async function inBrief(side, latent, title, stats) {
  const found = await side.brief_of(latent);
  const why = el("p.note", {}, `This page has ${side.full.length.toLocaleString("en-US")} of ${side.d_sae.toLocaleString("en-US")} latents in full; of this one it has its numbers and ` +
    (found.length ? "strongest texts" : "no text: it fires on none of the tokens looked at") +
    ". For logit effects, examples from strong to weak and its neighbours, make a page with it: ",
    el("code", {}, `python -m vsae_jax.dashboard --run=RUN --features=${latent},`));
  const texts = found.length ? [el("h2", {}, "Strongest activations"), el("div.card", {}, ...sequences(side, { max: side.columns.max[latent] }, found))] : [];
  return el("section.panel", {}, title, stats, ...texts, why);
}

function statistics(side, latent, f) {
  const c = side.columns;
  const rows = [
    ["share of tokens", percent(c.rate[latent])], ["firings", c.fired[latent].toLocaleString("en-US")],
    ["largest", number(c.max[latent], 4)], ["mean when active", number(c.mean[latent])],
    ["mean over all", number(c.mean_all[latent])], ["decoder norm", number(c.norm[latent])],
  ];
  if (f) rows.splice(4, 0, ["spread when active", number(f.std)]);
  return el("dl.stats", {}, ...rows.flatMap(([name, value]) => [el("div", {}, el("dt", {}, name), el("dd", {}, value))]));
}

// Sequences with the peak in one column, so that the eye can run down it.
function sequences(side, f, found) {
  const most = Math.abs(f.max);
  return found.map((one) => {
    const middle = one.peak;
    const effects = one.effects;
    const tokens = one.ids.map((id, i) => token(side.text(id), one.values[i], { most, peak: i === middle, effect: effects ? effects[i] : null }));
    const value = el("span.value", { title: `context ${one.context}, position ${one.position}` }, number(one.values[middle]));
    return el("div.sequence", {}, value, el("span.before", {}, el("span", {}, ...tokens.slice(0, middle))), tokens[middle], el("span.after", {}, ...tokens.slice(middle + 1)));
  });
}

function groups(side, f) {
  const share = number(100 / f.groups.length);
  return f.groups.filter((group) => group.found.length).map((group, n) =>
    el("details.group", { open: n < 3 },
      el("summary", {}, el("b", {}, n === 0 ? `Strongest ${share} %` : `${number(n * 100 / f.groups.length)} to ${number((n + 1) * 100 / f.groups.length)} %`),
        ` of its firings: ${number(group.low)} to ${number(group.high)}`),
      el("div.card", {}, ...sequences(side, f, group.found)))).concat(
    [el("p.note", {}, `Equal shares of the latent's ${f.fired.toLocaleString("en-US")} firings, their borders from a uniform sample of ${f.sampled}; the examples are drawn at random within each share.`)]);
}

function logits(side, f) {
  const [low, high] = f.logits.range, n = f.logits.histogram.length;
  const bins = f.logits.histogram.map((count, i) => ({ low: low + ((high - low) * i) / n, high: low + ((high - low) * (i + 1)) / n, counts: [count] }));
  const list = (name, pairs, kind) => el("div", {}, el("h3", {}, name), el(`ol.logits.${kind}`, {}, ...pairs.map(([id, value]) => {
    const row = el("li", {}, chip(side.text(id)), el("span.number", {}, number(value)));
    row.style.setProperty("--v", Math.min(Math.abs(value) / Math.max(Math.abs(low), Math.abs(high), 1e-9), 1).toFixed(3));
    return row;
  })));
  return el("div.figures", {},
    el("div.card.two", {}, list("Makes likely", f.logits.top, "up"), list("Makes unlikely", f.logits.bottom, "down")),
    histogram("All tokens of the vocabulary", bins, { classes: [side.letter], log: true, label: "logit effect", note: "The decoder row through the final norm and the unembedding, past the blocks in between. Counts on a logarithmic axis." }));
}

function activations(side, f) {
  const { width, first, counts } = f.histogram;
  const bins = counts.map((count, i) => ({ low: (first + i) * width, high: (first + i + 1) * width, counts: [count] }));
  return histogram(`${f.fired.toLocaleString("en-US")} activations`, bins, { classes: [side.letter], log: true, label: "f", note: "Counts on a logarithmic axis." });
}

function related(side, f) {
  const rows = (pairs) => pairs.map(([latent, value]) => el("li", {}, el("a", { href: side.route(latent) }, String(latent)), " ",
    side.columns.peak[latent] >= 0 ? chip(side.text(side.columns.peak[latent])) : el("span.soft", {}, "never fires"), el("span.number", {}, number(value, 2))));
  const list = (name, pairs) => el("div", {}, el("h3", {}, name), pairs.length ? el("ol.related", {}, ...rows(pairs)) : el("p.note", {}, "none"));
  return el("div.card.two", {}, list("Fires together (correlation)", f.correlated), list("Nearest decoder rows (cosine)", f.neighbours));
}

function synthetic(f) {
  if (!f.maximised) return null;
  const row = (name, made) => {
    if (!made) return null;
    const most = Math.max(...made.activations.filter((v) => v !== null).map(Math.abs), 1e-9);
    return el("div.made", {}, el("h3", {}, name), el("p.sequence-free", {}, ...made.tokens.map((text, i) => token(text, made.activations[i], { most }))));
  };
  return el("div", {}, el("h2", {}, "Synthetic and real maximum"), el("div.card", {}, row("Found by gradient ascent, re-scored on its real tokens", f.maximised.synthetic), row("The strongest real context", f.maximised.real)));
}
