// Asks as Vercel's AI SDK does: a line of JSON on standard input is a request, {kind, stream,
// salt}, and a line on standard output is what an application gets of it, with its Cache-Status.
import { createInterface } from "node:readline";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";

const { url, model, questions, tool: weather, schema } = JSON.parse(process.env.ASKED);

const provider = createOpenAICompatible({
  name: "tierserve",
  baseURL: url,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const kinds = {
  text: {},
  tools: {
    tools: { [weather.name]: tool({ inputSchema: jsonSchema(weather.schema), strict: true }) },
    toolChoice: { type: "tool", toolName: weather.name },
  },
  structured: { output: Output.object({ schema: jsonSchema(schema) }) },
};

async function ask({ kind, stream, salt }) {
  const result = await (stream ? streamText : generateText)({
    model: provider(model),
    prompt: questions[kind],
    temperature: 0,
    maxOutputTokens: 64,
    maxRetries: 0,
    providerOptions: { tierserve: { cache_salt: salt } },
    ...kinds[kind],
  });
  const calls = await result.toolCalls;
  return {
    told: {
      text: await result.text,
      calls: calls.map(({ toolName, input }) => ({ toolName, input })),
      output: kind === "structured" ? await result.output : null,
    },
    rest: {
      ids: calls.map(({ toolCallId }) => toolCallId),
      reason: await result.finishReason,
      usage: await result.usage,
    },
    status: (await result.response).headers["cache-status"],
  };
}

for await (const line of createInterface({ input: process.stdin })) {
  const said = await ask(JSON.parse(line)).catch((error) => ({ error: String(error) }));
  console.log(JSON.stringify(said));
}
