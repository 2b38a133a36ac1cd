// The first view: what was trained, its numbers, its curves, all latents at a glance.

const CORE = {
  ce_loss_score: "loss recovered",
  explained_variance: "explained variance",
  cossim: "cosine",
  l0: "L0",
  kl_div_score: "KL score",
  frac_alive: "alive (evaluation)",
};
const CURVES = { loss: "Loss", explained_variance: "Explained variance", squared_error: "Squared error", kl: "KL", l0: "L0", dead_fraction: "Share of dead latents" };

function overview(sides, matched) {
  const classes = sides.map((side) => side.letter);
  return el("div", {},
    el("h1", {}, sides.map((side) => side.name).join(" against ")),
    el("p.lead", {}, ...sides.map(introduction)),
    tiles(sides),
    matched ? matching(sides[0], matched) : null,
    el("h2", {}, "Latents at a glance"),
    el("div.figures", {}, ...glance(sides, classes)),
    el("h2", {}, "Maps"),
    el("div.figures.wide", {}, ...sides.filter((side) => side.map).map(mapFigure)),
    ...training(sides),
    el("h2", {}, "Settings"),
    settings(sides),
    el("p.note", {}, "Everything shown here is also in the run's folder features/, as features.npz and features.json."));
}

function introduction(side) {
  const count = side.columns.fired.filter((n) => n > 0).length;
  return el("span.side", {},
    el(`span.key.${side.letter}`, {}),
    `${side.name}: ${side.d_sae.toLocaleString("en-US")} latents on ${side.hook} of ${side.model}, ` +
    `${count.toLocaleString("en-US")} of which fire on the ${side.n_tokens.toLocaleString("en-US")} tokens looked at (${side.where}).`);
}

function tile(name, values) {
  return el("div.tile", {}, el("span.name", {}, name),
    ...values.map(([letter, value]) => el(`span.value.${letter}`, {}, value)));
}

function tiles(sides) {
  const found = [];
  for (const [key, name] of Object.entries(CORE)) {
    const values = sides.filter((s) => s.metrics?.[key] !== undefined).map((s) => [s.letter, number(s.metrics[key], 4)]);
    if (values.length) found.push(tile(name, values));
  }
  for (const least of [0, 1e-4, 1e-2]) {
    const name = least ? `fire on over ${percent(least)}` : "fire at all";
    found.push(tile(name, sides.map((s) => [s.letter, percent(s.columns.rate.filter((r) => r > least).length / s.d_sae)])));
  }
  // Rows of nearly equal length, of seven at most.
  const grid = el("div.tiles", {}, ...found);
  grid.style.setProperty("--columns", Math.ceil(found.length / Math.ceil(found.length / 7)));
  return grid;
}

function glance(sides, classes) {
  const key = sides.length > 1 ? " " + sides.map((s) => `${s.letter.toUpperCase()}: ${s.name}`).join(", ") : "";
  const rates = logBins(sides.map((s) => s.columns.rate));
  const sizes = logBins(sides.map((s) => s.columns.max.map(Math.abs)));
  const silent = sides.map((s) => s.columns.fired.filter((n) => n === 0).length.toLocaleString("en-US")).join(" and ");
  return [
    rates.length ? histogram("Firing rate", rates, { classes, xText: power, label: "share of tokens", xTicks: logTicks(rates), note: `${silent} never fire.${key}` }) : null,
    sizes.length ? histogram("Largest activation", sizes, { classes, xText: power, label: "largest |f|, logarithmic, all latents", xTicks: logTicks(sizes), note: `Not clipped: every latent that fires is in a bar.${key}` }) : null,
  ].filter((one) => one !== null);
}

function matching(side, { said, chance }) {
  const cosines = side.columns.cosine.filter((_, i) => side.columns.partner[i] >= 0);
  const words = el("div.card", {}, ...said.map((line) => el("p", {}, line)));
  if (!cosines.length) return el("section", {}, el("h2", {}, "Matched latents"), words);
  const bins = Array.from({ length: 20 }, (_, i) => ({ low: i / 20, high: (i + 1) / 20, counts: [0, 0] }));
  [cosines, chance].forEach((values, series) => {
    for (const c of values) bins[Math.max(0, Math.min(19, Math.floor(c * 20)))].counts[series]++;
  });
  return el("section", {}, el("h2", {}, "Matched latents"),
    el("div.figures", {}, words, histogram("Cosine of matched decoder rows", bins, { classes: ["a", "chance"],
      label: "cosine (negative ones in the first bar)", note: "Grey: as many random directions, matched in the same way." })));
}

function training(sides) {
  const drawn = [];
  for (const [key, name] of Object.entries(CURVES)) {
    const lines = sides.filter((s) => s.training?.[key]).map((s) => ({ x: s.training.step, y: s.training[key], class: s.letter }));
    const moving = lines.some((l) => new Set(l.y).size > 1);
    const chart = lines.length && moving ? curves(name, lines) : null;
    if (chart) drawn.push(chart);
  }
  return drawn.length ? [el("h2", {}, "Training"), el("div.figures", {}, ...drawn), el("p.note", {}, "The frames fit all but the first tenth of the steps.")] : [];
}

function settings(sides) {
  const names = [...new Set(sides.flatMap((s) => Object.keys(s.settings)))];
  const show = (value) => (value === null || value === undefined ? "–" : String(value));
  return el("div.scroll", {}, el("table.settings", {},
    el("thead", {}, el("tr", {}, el("th", {}, "setting"), ...sides.map((s) => el("th", {}, s.name)))),
    el("tbody", {}, ...names.map((name) => {
      const values = sides.map((s) => show(s.settings[name]));
      const differs = new Set(values).size > 1;
      return el(differs ? "tr.differs" : "tr", {}, el("th", {}, name), ...values.map((v) => el("td", {}, v)));
    }))));
}
