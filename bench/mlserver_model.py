"""The smallest runtime for MLServer of an ONNX graph. Runs in an environment of its own: no tlexport in it.

Its model-settings.json names the class `mlserver_model.Graph`, the graph as `parameters.uri` and `parameters.extra.threads`.
"""

import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Graph(MLModel):
    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(self.settings.parameters.extra["threads"])
        options.inter_op_num_threads = 1
        uri = self.settings.parameters.uri
        self.session = ort.InferenceSession(uri, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        made = self.session.run(None, {of.name: NumpyCodec.decode_input(of) for of in payload.inputs})
        outputs = [
            NumpyCodec.encode_output(of.name, array)
            for of, array in zip(self.session.get_outputs(), made, strict=True)
        ]
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=outputs)
