// Writes the dashboards as JSON: `node src/generate.ts [DIRECTORY]`, grafana/ beside this folder by default.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { communication } from './communication.ts';
import { shards } from './shards.ts';
import { training } from './training.ts';
import { workers } from './workers.ts';

const directory = process.argv[2] ?? join(import.meta.dirname, '..', 'grafana');
mkdirSync(directory, { recursive: true });
for (const [name, made] of Object.entries({ training, communication, shards, workers })) {
  writeFileSync(join(directory, `${name}.json`), `${JSON.stringify(made(), null, 2)}\n`);
}
