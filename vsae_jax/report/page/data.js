// The data inside the page: gzip in base64, opened where it is needed.

async function unpacked(id) {
  const packed = document.getElementById(id).textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (one) => one.charCodeAt(0));
  const stream = new Blob([bytes]).stream();
  const plain = stream.pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(plain).text());
}

// One autoencoder: what the table needs of every latent, and some latents in full.
class Side {
  constructor(run, index) {
    Object.assign(this, run);
    this.index = index;
    this.letter = "ab"[index];
    this.places = new Map(run.full.map((latent, place) => [latent, place]));
    this.chunks = new Map();
  }

  text(id) {
    return this.texts[id] ?? `<${id}>`;
  }

  route(latent) {
    return `#/${this.letter}/${latent}`;
  }

  // All of one latent, or null where the page has it in brief.
  async full_of(latent) {
    return this.places.has(latent) ? this.held("features", this.places.get(latent), this.chunk) : null;
  }

  // The strongest texts of a latent that is not there in full.
  async brief_of(latent) {
    const earlier = this.full.filter((other) => other < latent).length;
    return this.held("briefs", latent - earlier, this.chunk_in_brief);
  }

  // The item at that place of the blocks `kind`, each of `size` items.
  async held(kind, place, size) {
    const id = `${kind}-${this.letter}-${Math.floor(place / size)}`;
    if (!this.chunks.has(id)) this.chunks.set(id, unpacked(id));
    return (await this.chunks.get(id))[place % size];
  }
}

function alive(side, latent) {
  return side.columns.fired[latent] > 0;
}
