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

  // All of one latent, or null where the page holds only its row of the table.
  async full_of(latent) {
    const place = this.places.get(latent);
    if (place === undefined) return null;
    const chunk = Math.floor(place / this.chunk);
    if (!this.chunks.has(chunk)) {
      this.chunks.set(chunk, unpacked(`features-${this.letter}-${chunk}`));
    }
    return (await this.chunks.get(chunk))[place % this.chunk];
  }
}

function alive(side, latent) {
  return side.columns.fired[latent] > 0;
}
