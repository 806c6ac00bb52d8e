// Not run: see README.md.

import ai.onnxruntime.genai.Adapters
import ai.onnxruntime.genai.Generator
import ai.onnxruntime.genai.GeneratorParams
import ai.onnxruntime.genai.Model
import ai.onnxruntime.genai.Tokenizer
import java.io.File

/** A language model, from a folder that `to_genai` wrote. */
class Chat(private val folder: File) : AutoCloseable {
    private val model = Model(folder.path)
    private val tokenizer = Tokenizer(model)
    private val adapters = Adapters(model)

    /** Makes an adapter of the folder known; its file stays in use. */
    fun addAdapter(name: String, file: File) =
        adapters.loadAdapter(file.path, name)

    /** Calls `onText` with each piece of the answer, until it says `false`. */
    fun answer(
        prompt: String,
        adapter: String? = null,
        limit: Double = 512.0,
        onText: (String) -> Boolean,
    ) {
        // The prompt has the form that the model's chat template gives it.
        tokenizer.encode(prompt).use { tokens ->
            GeneratorParams(model).use { settings ->
                settings.setSearchOption("max_length", limit)
                Generator(model, settings).use { generator ->
                    adapter?.let { generator.setActiveAdapter(adapters, it) }
                    generator.appendTokenSequences(tokens)
                    tokenizer.createStream().use { stream ->
                        while (!generator.isDone) {
                            generator.generateNextToken()
                            val id = generator.getLastTokenInSequence(0)
                            if (!onText(stream.decode(id))) return
                        }
                    }
                }
            }
        }
    }

    override fun close() {
        adapters.close()
        tokenizer.close()
        model.close()
    }
}
