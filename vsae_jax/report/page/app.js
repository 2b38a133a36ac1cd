// Which view is shown, and the keys.

const VIEWS = { "": "Overview", table: "Latents", prompts: "Texts" };

async function start() {
  const data = await unpacked("overview");
  const sides = data.sides.map((run, index) => new Side(run, index));
  const views = sides.map((side) => new View(side));
  const state = { sides, views, matching: data.matching, main: document.getElementById("main"), search: document.getElementById("search") };
  document.title = sides.map((side) => side.name).join(" against ");
  watchTips(document.getElementById("tip"));
  watchTheme();
  watchKeys(state);
  state.search.addEventListener("input", () => searched(state));
  window.addEventListener("hashchange", () => show(state));
  await show(state);
  document.body.dataset.ready = "yes";
  performance.mark("ready");
}

// The address after # as its parts: view, side, latent.
function place(state) {
  const parts = location.hash.replace(/^#\/?/, "").split("/");
  const side = state.sides.find((s) => s.letter === (parts[0] in VIEWS ? parts[1] : parts[0])) ?? state.sides[0];
  const latent = /^\d+$/.test(parts[1] ?? "") ? Number(parts[1]) : -1;
  const feature = "ab".includes(parts[0] || "-") && latent >= 0 && latent < side.d_sae;
  return { view: feature ? "feature" : parts[0] in VIEWS ? parts[0] : "", side, latent };
}

async function show(state) {
  const now = place(state), asked = location.hash;
  drawNav(state, now);
  const view = state.views[now.side.index];
  let drawn;
  if (now.view === "feature") drawn = await featurePage(now.side, now.latent, state.views);
  else if (now.view === "table") drawn = table(view, state.sides, state.views, () => (view.update(), show(state)));
  else if (now.view === "prompts") drawn = promptsPage(now.side, state.sides);
  else drawn = overview(state.sides, state.matching);
  if (location.hash !== asked) return;
  state.main.replaceChildren(drawn);
  document.getElementById("tip").hidden = true;
  document.body.dataset.place = asked || "#/";
  if (now.view !== "table") window.scrollTo(0, 0);
}

function drawNav(state, now) {
  document.getElementById("nav").replaceChildren(...Object.entries(VIEWS).map(([name, words]) =>
    el(name === now.view ? "a.on" : "a", { href: `#/${name}${name ? `/${now.side.letter}` : ""}` }, words)));
}

// Typing searches every side's table; Enter on a number opens that latent.
function searched(state) {
  for (const view of state.views) {
    view.words = state.search.value;
    view.update();
  }
  const now = place(state);
  if (now.view === "table") show(state);
  else location.hash = `#/table/${now.side.letter}`;
}

function watchKeys(state) {
  document.addEventListener("keydown", (event) => {
    const typing = event.target === state.search;
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const now = place(state), step = { ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1 }[event.key];
    if (typing && event.key === "Enter") openFirst(state, now);
    if (event.key === "Escape") typing ? state.search.blur() : (location.hash = `#/table/${now.side.letter}`);
    if (typing) return;
    if (step && now.view === "feature") location.hash = now.side.route(state.views[now.side.index].beside(now.latent, step));
    if (event.key === "/") event.preventDefault(), state.search.focus();
    if (event.key === "t") toggleTheme();
  });
}

function openFirst(state, now) {
  const first = state.views[now.side.index].latents[0];
  const exact = Number(state.search.value);
  const latent = /^\s*\d+\s*$/.test(state.search.value) && exact < now.side.d_sae ? exact : first;
  if (latent === undefined) return;
  state.search.blur();
  location.hash = now.side.route(latent);
}

const DARK = window.matchMedia("(prefers-color-scheme: dark)");

function dark() {
  return (document.documentElement.dataset.theme ?? (DARK.matches ? "dark" : "light")) === "dark";
}

function toggleTheme() {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  document.dispatchEvent(new Event("theme"));
}

function watchTheme() {
  document.getElementById("theme").addEventListener("click", toggleTheme);
}

start().catch((error) => {
  document.getElementById("main").textContent = `This page could not be opened: ${error.message}`;
  throw error;
});
