"""The OpenAI Responses dialect: ``/v1/responses``, its store and its token count."""
