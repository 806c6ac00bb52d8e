// Not run: see README.md.

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import java.io.File
import java.nio.IntBuffer
import org.json.JSONArray

/** A classifier of texts, from a folder that `to_onnx` wrote. */
class Classifier(folder: File) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session =
        environment.createSession(File(folder, "model.onnx").path)
    private val labels = JSONArray(File(folder, "labels.json").readText())

    /** The label of a text, whose ids are framed as `preprocessor.json` says. */
    fun classify(ids: IntArray, paddingId: Int = 0): String {
        val mask = IntArray(ids.size) { if (ids[it] == paddingId) 0 else 1 }
        val values = mapOf(
            "token_ids" to ids,
            "padding_mask" to mask,
            "segment_ids" to IntArray(ids.size),
        )
        val inputs = session.inputNames.associateWith {
            val shape = longArrayOf(1, ids.size.toLong())
            OnnxTensor.createTensor(
                environment, IntBuffer.wrap(values.getValue(it)), shape)
        }
        try {
            session.run(inputs).use { outputs ->
                @Suppress("UNCHECKED_CAST")
                val logits = (outputs[0].value as Array<FloatArray>)[0]
                val best = logits.indices.maxByOrNull { logits[it] } ?: 0
                return labels.getString(best)
            }
        } finally {
            inputs.values.forEach { it.close() }
        }
    }

    override fun close() = session.close()
}
