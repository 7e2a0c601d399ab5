import { defineConfig } from "vite";
import { viteSingleFile } from "vite-plugin-singlefile";

// One file, so that the page can be served by Tandem or mailed: ../tandem/explore/page.html.
export default defineConfig({
  plugins: [viteSingleFile({ removeViteModuleLoader: true })],
  build: { outDir: "dist", emptyOutDir: true, target: "es2022" },
});
