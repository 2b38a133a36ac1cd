// All latents as a table: searched, sorted, and drawn only where it is looked at.

const ROW = 38, SPARE = 12;

function columnsOf(side) {
  const c = side.columns;
  return [
    { key: "latent", name: "latent", value: (i) => i, cell: (i) => [String(i)] },
    { key: "peak", name: "fires on", value: (i) => side.text(c.peak[i]).trim().toLowerCase(), cell: (i) => (c.peak[i] < 0 ? [el("span.soft", {}, "never fires")] : [chip(side.text(c.peak[i]))]) },
    { key: "rate", name: "firing rate", value: (i) => c.rate[i], cell: (i) => [percent(c.rate[i])], number: true },
    { key: "max", name: "max", value: (i) => Math.abs(c.max[i]), cell: (i) => [number(c.max[i])], number: true },
    { key: "mean", name: "mean when active", value: (i) => c.mean[i], cell: (i) => [number(c.mean[i])], number: true, wide: true },
    { key: "logit", name: "top logit", value: (i) => c.logit[i], cell: (i) => [number(c.logit[i])], number: true, wide: true },
    { key: "promotes", name: "makes likely", value: (i) => side.text(c.promotes[i][0]).trim().toLowerCase(), cell: (i) => c.promotes[i].map((id) => chip(side.text(id))), wide: true },
    ...(c.partner ? [{ key: "partner", name: "match", value: (i) => (c.partner[i] < 0 ? -2 : c.cosine[i]), cell: (i) => [c.partner[i] < 0 ? "–" : `${c.partner[i]} (${number(c.cosine[i], 2)})`], number: true, wide: true }] : []),
  ];
}

// What the table shows, kept while features are looked at: their order is its order.
class View {
  constructor(side) {
    this.side = side;
    this.key = "latent";
    this.down = false;
    this.words = "";
    this.dead = true;
    this.update();
  }

  // Keeps the latents that the words name (a number, or part of a token), in order.
  update() {
    const { side } = this, words = this.words.trim().toLowerCase();
    const column = columnsOf(side).find((c) => c.key === this.key);
    const named = (id) => id >= 0 && side.text(id).toLowerCase().includes(words);
    const found = [];
    for (let i = 0; i < side.d_sae; i++) {
      if (!this.dead && !alive(side, i)) continue;
      const asked = !words || (/^\d+$/.test(words) && String(i).startsWith(words)) ||
        named(side.columns.peak[i]) || side.columns.promotes[i].some(named);
      if (asked) found.push(i);
    }
    const value = found.map(column.value);
    const order = found.map((_, n) => n).sort((m, n) => {
      const [x, y] = [value[m], value[n]];
      return (x < y ? -1 : x > y ? 1 : 0) * (this.down ? -1 : 1) || found[m] - found[n];
    });
    this.latents = order.map((n) => found[n]);
  }

  // The latent `step` places further in the table's order.
  beside(latent, step) {
    const order = this.latents.includes(latent) ? this.latents : this.side.columns.fired.map((_, i) => i);
    const at = order.indexOf(latent);
    return order[(at + step + order.length) % order.length] ?? latent;
  }
}

function table(view, sides, views, redraw) {
  const { side } = view, columns = columnsOf(side);
  const count = el("span.soft", {});
  const body = el("div.rows", {});
  const scroller = el("div.table", { tabIndex: 0 });
  const head = el("div.row.head", {}, ...columns.map((column) => headCell(column, view, redraw)));
  scroller.append(head, body);
  const draw = () => drawRows(view, columns, scroller, body);
  scroller.addEventListener("scroll", () => requestAnimationFrame(draw));
  const dead = el("input", { type: "checkbox", checked: view.dead });
  dead.addEventListener("change", () => ((view.dead = dead.checked), redraw()));
  count.textContent = `${view.latents.length.toLocaleString("en-US")} of ${side.d_sae.toLocaleString("en-US")} latents`;
  const other = sides.length > 1 ? el("span.switch", {}, ...sides.map((s) =>
    el(s === side ? "a.on" : "a", { href: `#/table/${s.letter}` }, el(`span.key.${s.letter}`), s.name))) : null;
  const faint = side.full.length < side.d_sae
    ? el("p.note", {}, `${side.full.length.toLocaleString("en-US")} latents are here in full; of the others, in grey, the strongest texts. Ask for more with --features=.`) : null;
  requestAnimationFrame(draw);
  return el("div", {}, el("h1", {}, "Latents"), el("div.controls", {}, other, count, el("label", {}, dead, " also those that never fire")), faint, scroller);
}

function headCell(column, view, redraw) {
  const mark = view.key === column.key ? (view.down ? " ↓" : " ↑") : "";
  const cell = el(`button.cell.${column.key}${column.number ? ".number" : ""}${column.wide ? ".wide" : ""}`, { type: "button" }, column.name + mark);
  cell.dataset.sort = column.key;
  cell.addEventListener("click", () => {
    view.down = view.key === column.key ? !view.down : Boolean(column.number);
    view.key = column.key;
    redraw();
  });
  return cell;
}

function drawRows(view, columns, scroller, body) {
  body.style.height = `${view.latents.length * ROW}px`;
  const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - SPARE);
  const last = Math.min(view.latents.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + SPARE);
  body.replaceChildren(...view.latents.slice(first, last).map((latent, n) => {
    const full = view.side.places.has(latent);
    const row = el(`a.row${full ? "" : ".faint"}${alive(view.side, latent) ? "" : ".dead"}`, { href: view.side.route(latent) },
      ...columns.map((column) => el(`span.cell.${column.key}${column.number ? ".number" : ""}${column.wide ? ".wide" : ""}`, {}, ...column.cell(latent))));
    row.style.top = `${(first + n) * ROW}px`;
    row.dataset.latent = latent;
    return row;
  }));
}
