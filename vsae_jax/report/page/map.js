// The map of the latents on a canvas: a dot a latent, coloured by cluster or by rate.

const CLUSTERS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8f8a00", "#7b61c9", "#a6761d", "#666f7a"];

function mapFigure(side) {
  const map = side.map;
  const canvas = el("canvas.map", { width: 900, height: 620 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${map.title} of ${side.name}`);
  const tip = document.getElementById("tip");
  const by = el("select", { ariaLabel: "Colour by" },
    ...[...(map.cluster ? ["cluster"] : []), "firing rate", "largest activation"].map((name) => el("option", {}, name)));
  const dots = placed(map, canvas);
  const draw = () => drawMap(canvas, dots, colours(side, map, by.value));
  by.addEventListener("change", draw);
  document.addEventListener("theme", draw);
  const under = (event) => nearest(canvas, dots, event);
  canvas.addEventListener("pointermove", (event) => {
    const dot = under(event);
    canvas.style.cursor = dot ? "pointer" : "default";
    canvas.tip = dot && mapWords(side, map, dot.index);
  });
  canvas.dataset.tip = "";
  canvas.addEventListener("pointerleave", () => (tip.hidden = true));
  canvas.addEventListener("click", (event) => {
    const dot = under(event);
    if (dot) location.hash = side.route(map.latents[dot.index]);
  });
  draw();
  return figure(`${map.title} · ${side.name}`, map.note, el("p.controls", {}, "colour by ", by), canvas);
}

function mapWords(side, map, index) {
  const latent = map.latents[index];
  const cluster = map.cluster ? `\ncluster ${map.cluster[index]}` : "";
  const fires = side.columns.peak[latent];
  return `latent ${latent}: ${fires >= 0 ? plainly(side.text(fires)) : "never fires"}` +
    `\nfires on ${percent(side.columns.rate[latent])} of tokens${cluster}`;
}

// Where each point lies on the canvas, with a margin.
function placed(map, canvas) {
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const [x0, x1] = range(map.x), [y0, y1] = range(map.y);
  return map.x.map((x, index) => ({
    index,
    x: 18 + ((x - x0) / (x1 - x0 || 1)) * (canvas.width - 36),
    y: 18 + ((map.y[index] - y0) / (y1 - y0 || 1)) * (canvas.height - 36),
  }));
}

// Blue to yellow, for every kind of colour vision; its dark end is no darker than the
// ground can bear.
const STOPS = [[0, 48, 110], [90, 98, 112], [196, 168, 90], [240, 205, 40]];
const STOPS_DARK = [[60, 110, 190], [120, 135, 150], [196, 180, 110], [253, 231, 80]];

function ramp(share) {
  const stops = dark() ? STOPS_DARK : STOPS;
  const at = Math.min(share * 3, 2.999), low = Math.floor(at);
  const mixed = stops[low].map((v, i) => Math.round(v + (at - low) * (stops[low + 1][i] - v)));
  return `rgb(${mixed.join(",")})`;
}

function colours(side, map, by) {
  if (by === "cluster") return map.cluster.map((c) => CLUSTERS[((c % 10) + 10) % 10]);
  const column = by === "firing rate" ? side.columns.rate : side.columns.max;
  const values = map.latents.map((latent) => Math.abs(column[latent]));
  const order = values.map((_, i) => i).sort((i, j) => values[i] - values[j]);
  const found = new Array(values.length);
  order.forEach((i, rank) => (found[i] = ramp(rank / Math.max(order.length - 1, 1))));
  return found;
}

function drawMap(canvas, dots, colour) {
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.globalAlpha = 0.8;
  for (const dot of dots) {
    pen.fillStyle = colour[dot.index];
    pen.beginPath();
    pen.arc(dot.x, dot.y, dots.length > 3000 ? 3 : 4.5, 0, 7);
    pen.fill();
  }
}

function nearest(canvas, dots, event) {
  const box = canvas.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * canvas.width;
  const y = ((event.clientY - box.top) / box.height) * canvas.height;
  let best = null, least = 14 ** 2;
  for (const dot of dots) {
    const distance = (dot.x - x) ** 2 + (dot.y - y) ** 2;
    if (distance < least) [best, least] = [dot, distance];
  }
  return best;
}
